"""The part that commands with a target share: what to compile, with which options, and what is said where that fails."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from dct_compile.cli.parsing import check_options, parse_options
from dct_compile.models.recipes import RECIPES
from dct_compile.options import default_options

if TYPE_CHECKING:
    from dct_compile.cli.targets import Target

OPTIONS = "\b\nOptions of the backend and their defaults, for --options:\n" + "\n".join(
    f"  {name}={'[]' if value == () else value}" for name, value in default_options().items()
)


_EXPECTED = f"a model ({', '.join(RECIPES)}) or file.py:function, where the function returns (model, inputs)"


class TargetError(ValueError):
    """What was named cannot be inspected; the message says what was expected."""


def asked_for(words: Sequence[str], options: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the target and all options of the backend.

    Args:
        words: The arguments beside flags, in any order: the target, and options that follow others behind one ``--options``.
        options: The values of ``--options``.

    Raises:
        click.UsageError: There is no target or a second one, or an option follows no ``--options``.
    """
    more = [word for word in words if "=" in word and word.partition("=")[0].strip().isidentifier()]
    targets = [word for word in words if word not in more]
    if more and not options:
        raise click.UsageError(f"unexpected argument {more[0]!r}: options of the backend follow --options")
    if not targets:
        raise click.UsageError("Missing argument 'TARGET'.")
    if len(targets) > 1:
        raise click.UsageError(f"unexpected argument {targets[1]!r} beside the target {targets[0]!r}")
    return targets[0], [*options, *more]


def check_paths(*paths: Path | None) -> None:
    """Raises ``click.UsageError`` for a file that cannot be written, such as one in a folder that does not exist."""
    for path in filter(None, paths):
        if not path.resolve().parent.is_dir():
            raise click.UsageError(f"cannot write {path}: there is no folder {path.resolve().parent}")
        is_new = not path.exists()
        try:
            path.open("ab").close()  # permissions do not say it: some file systems take no file from anybody
            if is_new:
                path.resolve().unlink(missing_ok=True)  # another rank may have been here
        except OSError as error:
            raise click.UsageError(f"cannot write {path}: {error.strerror}") from error


def make_folder(folder: Path, result: str) -> None:
    """Makes a folder of results. Raises ``click.UsageError`` where it, or the file ``result`` in it, cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"cannot write to {folder}: {error}") from error
    check_paths(folder / result)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says that ``path`` was written. Turns an error of writing it into a ``click.ClickException`` that names it."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
    click.echo(f"wrote {path}")


def complete_file(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Lets the shell complete a target as a file."""
    return [CompletionItem(incomplete, type="file")]


def read(target: str, options: Sequence[str]) -> tuple[Callable[[], "Target"], dict[str, Any]]:
    """Returns the maker of the target and the options. Raises ``click.UsageError`` for what cannot be read."""
    try:
        parsed = parse_options(options)
        check_options(parsed)
        place = None if target in RECIPES else place_of(target, _EXPECTED)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    # Late, so that `dct --help` and usage errors do not wait for it.
    from dct_compile.cli.targets import MODELS, made_by

    return MODELS[target] if place is None else partial(made_by, *place), parsed


def place_of(name: str, expected: str) -> tuple[Path, str]:
    """Returns the file and the function that ``name`` stands for. Raises :class:`TargetError`, which says what is ``expected``."""
    path, separator, function = name.rpartition(":")
    if not separator:
        raise TargetError(f"unknown target {name!r}: expected {expected}")
    if not path.endswith(".py") or not function.isidentifier():
        raise TargetError(f"{name!r} is not of the form file.py:function: expected {expected}")
    if not Path(path).is_file():
        raise TargetError(f"there is no file {path!r}: expected {expected}")
    return Path(path), function


@contextmanager
def said(target: str) -> Iterator[None]:
    """Turns every error of making or compiling the target into a ``click.ClickException``; what torch logs on the way is silent."""
    from torch._logging._internal import set_logs

    if "TORCH_LOGS" not in os.environ:
        set_logs(all=logging.CRITICAL)  # the error says it
    try:
        yield
    except TargetError as error:
        raise click.ClickException(str(error)) from error
    except Exception as error:
        cause = getattr(error, "inner_exception", error)  # what torch says around a backend's error is of no help here
        raise click.ClickException(f"{target} could not be compiled: {type(cause).__name__}: {cause}") from error
