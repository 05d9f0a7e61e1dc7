"""Values that do not fit: NaN, infinities, more entries than a payload holds."""

from functools import partial
from pathlib import Path

import torch

import dct_compile
from faults.ranks import Rank, run_each
from faults.row import Row, check
from faults.training import GRADIENTS, Training, batch

STEPS, BAD = 12, (5, 9)
"""Steps of a training, and those in which rank 1 has bad values."""


def scaled(rank: Rank, way: str, bad: float) -> tuple[list[int], str, float]:
    """Trains with a GradScaler. Returns the steps that it skipped, the parameters' digest and the audit's error."""
    training = Training(way, {"audit": True})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    skipped = []
    with dct_compile.audit(training.model) as audit:
        for step in range(STEPS):
            x = batch(rank.number, step)
            if rank.number == 1 and step in BAD:
                x[0, 0] = bad
            scaler.scale(training.loss(x)).backward()
            before = scaler.get_scale()
            scaler.step(training.optimizer)
            scaler.update()
            training.optimizer.zero_grad()
            skipped += [step] if scaler.get_scale() < before else []
        found = audit.check()
    state = dct_compile.state_dict(training.model)
    check(all(bool(entry["residual"].isfinite().all()) for entry in state.values()), "a residual is not finite")
    return skipped, training.digest(), found.error


def not_finite(ways: tuple[str, ...], folder: Path) -> str:
    worst = 0.0
    cases = [(way, bad) for way in ways for bad in (float("nan"), float("inf"))]
    for (way, bad), ((skipped, first, error), (other, second, _)) in zip(cases, run_each(2, scaled, cases), strict=True):
        check(skipped == other == list(BAD), f"{way}, {bad}: skipped {skipped} and {other}")
        check(first == second, f"{way}, {bad}: other parameters on each rank")
        worst = max(worst, error)
    return f"so in {len(ways)} of {len(ways)} ways; the audit differs by {worst:.0e} of the gradients"


def full(rank: Rank, way: str, scheme: str) -> tuple[int, str, float]:
    """Trains with payloads that cannot hold what is above the threshold. Returns the entries that had to wait."""
    training = Training(way, {"audit": True, "threshold": 1e-7, "gradient_scheme": scheme})
    with dct_compile.audit(training.model) as audit:
        training.steps(rank.number, range(STEPS))
        found = audit.check()
    waited = sum(int(entry["counters"][3]) for entry in dct_compile.state_dict(training.model).values())
    return waited, training.digest(), found.error


def overflow(folder: Path) -> str:
    least, worst = 10**9, 0.0
    cases = [(way, scheme) for way in GRADIENTS for scheme in ("gather", "owner")]
    for (way, scheme), ((waited, first, error), (_, second, _)) in zip(cases, run_each(2, full, cases), strict=True):
        check(waited > 0, f"{way}, {scheme}: no overflow was counted")
        check(first == second, f"{way}, {scheme}: other parameters on each rank")
        least, worst = min(least, waited), max(worst, error)
    return f"so; at least {least} entries had to wait, and the audit differs by {worst:.0e} of the gradients"


ROWS = (
    Row(
        "NaN or Inf with GradScaler",
        "rank 1 has one such input in two of twelve steps; compile(DDP), DDP(compile), data_parallel",
        "all ranks skip these steps and no others; residuals stay finite; the audit is exact to rounding",
        2,
        partial(not_finite, GRADIENTS[:3]),
    ),
    Row(
        "overflow of a payload",
        "a fixed threshold of 1e-7: nearly every entry wants to be sent; gather and owner",
        "what does not fit is counted and waits; the audit is exact to rounding",
        2,
        overflow,
    ),
)
