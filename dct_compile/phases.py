"""The phases of a training: gradients travel dense at first (``start_iter``), then ever fewer of them (``density_warmup``)."""

from dataclasses import dataclass, replace

from dct_compile.config import DCTConfig
from dct_compile.warmup import explicit, geometric


@dataclass(frozen=True)
class Phase:
    """A part of a training in which gradients travel alike.

    ``first``: the number of its first exchange of a parameter, counted from 0 on. ``until``: that of the next phase, ``None`` for the last
    one. ``config``: the options that hold meanwhile, without a schedule of their own; dense phases have a ``dp_density`` of 1.
    """

    first: int
    until: int | None
    config: DCTConfig


def phases_of(config: DCTConfig) -> tuple[Phase, ...]:
    """Returns the phases of a training, in order. The last one has the ``dp_density`` of ``config``."""
    warmup = config.density_warmup
    schedule = geometric(warmup, config.dp_density) if isinstance(warmup, int) else explicit(warmup, config.dp_density)
    assert schedule is not None, "it was checked when it was set"
    pairs = [(0, 1.0)] if config.start_iter else []
    pairs += [(config.start_iter + step, density) for step, density in schedule]
    pairs = [pair for pair, before in zip(pairs, [None, *pairs], strict=False) if before is None or pair[1] != before[1]]
    plain, untils = replace(config, start_iter=0, density_warmup=0), [*(first for first, _ in pairs[1:]), None]
    return tuple(Phase(first, until, _at(plain, density, until)) for (first, density), until in zip(pairs, untils, strict=True))


def _at(config: DCTConfig, density: float, until: int | None) -> DCTConfig:
    """Returns the options of a phase. The last one (no ``until``) has all of ``config``.

    In the others no parameter has a lower density than the phase, and every step chooses its thresholds. Gradients change fast at the
    begin of a training. There an old threshold lets more entries wait than are sent, and arrive when they are old.
    """
    if until is None:
        return config
    if density == 1:
        return replace(config, dp_density=1.0, parameter_densities=())
    own = tuple((pattern, max(kept, density)) for pattern, kept in config.parameter_densities)
    return replace(config, dp_density=density, parameter_densities=own, refresh_interval=1)


def phase_at(phases: tuple[Phase, ...], exchanges: int) -> Phase:
    """Returns the phase of a parameter whose gradient was exchanged ``exchanges`` times before."""
    return next(phase for phase in reversed(phases) if phase.first <= exchanges)
