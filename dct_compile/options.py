"""The options of this project: told from those of Inductor, which share one dict, and described."""

import ast
import difflib
import inspect
import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from typing import Any

from dct_compile import config
from dct_compile.config import DCTConfig
from dct_compile.option_checks import OptionError

DENSE: Mapping[str, Any] = {
    "dp_density": 1.0,
    "activation_codec": "dense",
    "embedding_codec": "dense",
    "parameter_codec": "dense",
    "sharded_gradients": "dense",
}
"""The options under which everything travels as it is."""


def split_options(options: Mapping[str, Any] | None, inductor_keys: Collection[str]) -> tuple[DCTConfig, dict[str, Any]]:
    """Separates the flat ``options`` into this project's config and Inductor's own keys.

    Args:
        options: Values by key, as given to ``torch.compile``; ``None`` for no options.
        inductor_keys: The keys that Inductor knows, with underscores.

    Returns:
        The config, and the options for Inductor.

    Raises:
        ValueError: Neither knows a key (the message has the nearest known keys), or a value is not allowed.
    """
    own = {item.name: item for item in fields(DCTConfig)}
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key in own:
            ours[key] = value
        elif key.replace("-", "_") in inductor_keys:
            inductor[key.replace("-", "_")] = value
        else:
            near = difflib.get_close_matches(key, [*own, *inductor_keys], n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(
                f"unknown option {key!r} (value {value!r}) for backend 'dct': allowed are {', '.join(own)} "
                f"and the options of Inductor.{hint}"
            )
    return DCTConfig(**ours), inductor


def default_options() -> dict[str, Any]:
    """Returns every option with its default."""
    return {item.name: item.default for item in fields(DCTConfig) if item.default is not MISSING}


@dataclass(frozen=True)
class Option:
    """One option as users read it. ``default``: as Python writes it; ``allowed``: its values, in words; ``meaning``: in Markdown."""

    name: str
    default: str
    allowed: str
    meaning: str


def described() -> tuple[Option, ...]:
    """Returns every option, in the order of the fields of :class:`DCTConfig`.

    Default and meaning are those of the field and of the text below it. The allowed values are those that the check of a wrong value names.
    """
    classes = [node for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef)]
    body = next(node.body for node in classes if node.name == DCTConfig.__name__)
    meanings = {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
    found = []
    for name, default in default_options().items():
        allowed = _allowed(name)
        empty = "{}" if allowed.startswith("a mapping") else "[]"
        written = empty if default == () else json.dumps(default) if isinstance(default, str) else repr(default)
        found.append(Option(name, written, allowed, meanings[name]))
    return tuple(found)


def _allowed(name: str) -> str:
    nothing: Any = object()  # no option has it
    try:
        DCTConfig(**{name: nothing})
    except OptionError as error:
        return error.allowed
    raise AssertionError(f"option {name!r} takes anything")
