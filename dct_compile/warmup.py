"""The densities of a warm-up, step by step: geometric as in Deep Gradient Compression (Lin et al., ICLR 2018, arXiv 1712.01887)."""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

Schedule = tuple[tuple[int, float], ...]
"""The first step and the density of each part, in order."""

_FIRST, _FACTOR = 0.25, 4


def geometric(steps: int, density: float) -> Schedule:
    """Returns the schedule that goes down from 0.25 by factors of 4, in equal parts over ``steps`` steps, and then holds ``density``."""
    densities, current = [], _FIRST
    while current > density:
        densities.append(current)
        current /= _FACTOR
    starts = {part * steps // len(densities): held for part, held in enumerate(densities)}
    return tuple({**starts, (steps if densities else 0): density}.items())


def explicit(value: Any, density: float) -> Schedule | None:
    """Returns the schedule that a mapping {first step: density}, or its pairs, gives; ``None`` where it is none.

    Args:
        value: Steps from 0 on, with densities in (0, 1] that fall down to ``density``.
        density: The density of the training.
    """
    try:
        pairs = sorted(value.items() if isinstance(value, Mapping) else value)
        steps, densities = [step for step, _ in pairs], [kept for _, kept in pairs]
    except (TypeError, ValueError):
        return None
    if not pairs or not all(isinstance(step, Integral) and not isinstance(step, bool) for step in steps):
        return None
    if not all(isinstance(kept, Real) and not isinstance(kept, bool) for kept in densities):
        return None
    falls = all(before > after for before, after in zip([1.5, *densities], densities, strict=False))
    if not falls or steps[0] != 0 or len(set(steps)) < len(steps) or densities[0] > 1 or densities[-1] != density:
        return None
    return tuple((int(step), float(kept)) for step, kept in pairs)
