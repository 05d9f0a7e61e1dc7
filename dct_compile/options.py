"""Separates the options of this project from those of Inductor, which share one dict."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any

from dct_compile.config import DCTConfig


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
