"""Groups of commands that are imported when they run: most of them need torch, whose import takes seconds."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click


class _Placeholder(click.Command):
    """Stands for a command in lists and completions. ``home``: its module, in which it has the name of the command."""

    def __init__(self, name: str, home: str, text: str) -> None:
        super().__init__(name, help=text)
        self.home = home

    def load(self) -> click.Command:
        command = getattr(import_module(self.home), str(self.name))
        assert isinstance(command, click.Command)
        return command


class LazyGroup(click.Group):
    """A group whose commands are in modules of their own.

    Args:
        name: The name of the group.
        lazy: For each command its module, and the first sentence of its help.
        settings: As for ``click.Group``.
    """

    def __init__(self, name: str, lazy: Mapping[str, tuple[str, str]], **settings: Any) -> None:
        super().__init__(name, {command: _Placeholder(command, *entry) for command, entry in lazy.items()}, **settings)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Returns name, command and remaining arguments, for a run, for ``COMMAND --help`` and for completions."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, _Placeholder) else command, rest
