"""At which steps a threshold is chosen anew."""


def is_refresh_step(step: int, refresh_interval: int, refresh_warmup: str, overflowed: bool) -> bool:
    """Returns True if the threshold is selected at ``step`` (0, 1, 2, ...) of a parameter.

    "off" is the paper's plain schedule ([Gupta21] Alg. 1): every ``refresh_interval`` steps. Its first threshold is chosen while the
    residual is empty and is too low for the steps that follow. "geometric" therefore starts with a refresh at every step and lets the gap
    grow with the step (an eighth of it, in powers of two) up to ``refresh_interval``; it also refreshes after a step that overflowed.
    """
    if refresh_warmup == "off":
        return step % refresh_interval == 0
    gap = min(refresh_interval, max(1, (1 << step.bit_length() >> 1) // 8))
    return overflowed or step % gap == 0
