"""The numbers of one training, as a function that ``dct tune`` calls reports them."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from dct_compile.runtime import RUNTIME

RESULT = "DCT_COMPILE_TUNE_RESULT"
"""The environment variable with the file that the numbers go to."""


@dataclass(frozen=True)
class Measured:
    """One training.

    ``loss``: of which less is better. ``step_seconds``: of one step, as measured. ``wire_bytes``: sent per rank and step. ``hops``: the
    messages of a step of which each waits for the one before. ``kinds``: of the collectives, see :class:`dct_compile.SiteReport`.
    """

    loss: float
    step_seconds: float
    wire_bytes: float
    hops: int
    kinds: tuple[str, ...]


def report(loss: float, step_seconds: float, wire_bytes: float | None = None) -> Measured:
    """Reports the numbers of a training to ``dct tune``. The last report of rank 0 counts.

    Elsewhere than in ``dct tune`` the numbers are only returned, so the same function can be run by itself.

    Args:
        loss: The loss at the end, of which less is better. It must be comparable between trainings: use the same data and seeds.
        step_seconds: The time of a step in seconds, such as the median of those after the first ten.
        wire_bytes: The bytes that a rank sends per step. By default those that the backend has counted.

    Returns:
        The numbers, with what the backend knows of the collectives.

    Raises:
        ValueError: ``step_seconds`` is not a finite number above 0.
    """
    if not 0.0 < step_seconds < float("inf"):
        raise ValueError(f"step_seconds is {step_seconds!r}; allowed is a finite number above 0")
    sites = [site for site in RUNTIME.report().sites if site.training and site.calls and site.group_size > 1]
    if wire_bytes is None:
        wire_bytes = sum(site.calls * site.wire_bytes for site in sites)
    hops = sum(site.calls * site.hops for site in sites)
    found = Measured(float(loss), float(step_seconds), float(wire_bytes), hops, tuple(sorted({site.kind for site in sites})))
    if RESULT in os.environ and os.environ.get("RANK", "0") == "0":
        Path(os.environ[RESULT]).write_text(json.dumps(asdict(found)), encoding="utf-8")
    return found
