"""Reads what torchrun has written into the environment of each rank."""

import os

import click

_LAUNCH = "start the command with torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


def rank_and_ranks() -> tuple[int, int]:
    """Returns the rank and the number of ranks. Raises ``click.UsageError`` where they are no such numbers."""
    rank, ranks = number("RANK"), number("WORLD_SIZE", "1")
    if rank >= ranks:
        raise click.UsageError(f"RANK is {rank} in the environment, and WORLD_SIZE {ranks}: {_LAUNCH}")
    return rank, ranks


def check_meeting_place() -> None:
    """Raises ``click.UsageError`` where the environment does not say at which address the ranks meet."""
    if not os.environ.get("MASTER_ADDR"):
        raise click.UsageError(f"there is no MASTER_ADDR in the environment: {_LAUNCH}")
    number("MASTER_PORT")


def number(name: str, default: str | None = None) -> int:
    """Returns the number that the environment variable ``name`` holds. Raises ``click.UsageError`` where it holds none."""
    text = os.environ.get(name, default)
    if text is None:
        raise click.UsageError(f"there is no {name} in the environment: {_LAUNCH}")
    if not text.isdecimal():
        raise click.UsageError(f"{name} is {text!r} in the environment, which is not a number: {_LAUNCH}")
    return int(text)
