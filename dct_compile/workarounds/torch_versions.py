"""Tells which versions of torch were tested. ``docs/versions.md`` says what each lacks."""

import torch

NEWEST_TESTED = (2, 15)
"""The newest version of torch, as (major, minor), that the tests of this release pass on. The oldest is in ``pyproject.toml``."""


def untested_version() -> str | None:
    """Returns the version of torch if it is newer than all that were tested, else ``None``."""
    version = str(torch.__version__)
    release = tuple(int(part) for part in version.split(".")[:2])
    return version if release > NEWEST_TESTED else None
