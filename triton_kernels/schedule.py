"""At which steps a threshold is chosen anew, and how it follows in between."""

FEWEST = 4
"""Wanted entries of a parameter whose threshold is held, at least: of fewer a step often has none, which says nothing."""


def is_refresh_step(step: int, refresh_interval: int, refresh_warmup: str, overflowed: bool) -> bool:
    """Returns True if the threshold is selected at ``step`` (0, 1, 2, ...) of a parameter.

    "off" is the paper's plain schedule ([Gupta21] Alg. 1): every ``refresh_interval`` steps. Its first threshold is chosen while the
    residual is empty and is too low for the steps that follow. "geometric" therefore starts with a refresh at every step and lets the gap
    grow with the step (an eighth of it, in powers of two) up to ``refresh_interval``; it also refreshes after a step that overflowed. A
    threshold that is held counts a step as overflowed if more candidates waited than were sent.
    """
    if refresh_warmup == "off":
        return step % refresh_interval == 0
    gap = min(refresh_interval, max(1, (1 << step.bit_length() >> 1) // 8))
    return overflowed or step % gap == 0


def held_threshold(threshold: float, candidates: int, target: int, numel: int) -> float:
    """Returns the threshold after a step with ``candidates`` of ``numel`` elements, where ``target`` were wanted.

    It is multiplied by 1 + clamp(candidates - target, -target, target) / numel: by a fraction of itself that is at most the density. An
    element waits for about 1 / density steps, so many wait just below the threshold. Larger moves would release them at once, and
    the density would swing. Without candidates the threshold stays, since all W may be zero; so it is never far from a magnitude of W.

    The product and the quotient are rounded to float64. There is no sum that a compiler could fuse with them.
    """
    if candidates == 0 or target < FEWEST:
        return threshold
    return threshold * (numel - target + min(candidates, 2 * target)) / numel
