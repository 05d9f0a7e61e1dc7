"""Which elements of a parameter each owner's share holds under the "owner" scheme.

A parameter is cut into *units* of 256 elements, and every *round* of as many units as there are owners gives each of them one. Where large
entries lie side by side, each share gets its part of them. Which unit of a round an owner gets turns after every 16 rounds, by the golden
ratio, so that no share holds the same columns of all rows of a matrix::

    owner of each unit, 4 owners    0 1 2 3 | 0 1 2 3 | ... 16 rounds ... | 2 3 0 1 | 2 3 0 1 | ... 16 rounds ... | 0 1 2 3 | ...

A share is its units, end to end. The last one may be shorter, and small parameters leave some shares a unit less. With one owner the share
is the parameter as it is.
"""

from typing import TypeVar

from torch import Tensor

UNIT = 256
"""Elements that lie together in a parameter and in a share; tiles and blocks are counted along the share."""
ROUNDS = 16
"""Rounds between two turns: a tile. So the units of a tile lie at equal distances, which hardware foresees."""
TURN = 40503
"""The golden ratio in units of 2**-16: multiples of it, without their whole part, are evenly spread whatever distance they have."""

_Whole = TypeVar("_Whole", int, Tensor)


def unit_of(number: _Whole, chunks: int, chunk: int) -> _Whole:
    """Returns which units of a parameter are the units ``number`` of the share of ``chunk``."""
    turn = (number // ROUNDS * TURN & 0xFFFF) * chunks >> 16
    return number * chunks + (turn + chunk) % chunks


def place_of(element: Tensor, chunks: int, chunk: int) -> Tensor:
    """Returns where the elements ``element`` (int64) of the share of ``chunk`` lie in the parameter."""
    return unit_of(element // UNIT, chunks, chunk) * UNIT + element % UNIT


def share_numel(numel: int, chunks: int, chunk: int) -> int:
    """Returns how many of a parameter's ``numel`` elements the share of ``chunk`` has."""
    rounds = numel // (UNIT * chunks)  # complete ones
    return rounds * UNIT + min(max(numel - unit_of(rounds, chunks, chunk) * UNIT, 0), UNIT)
