"""Names of the methods that ``dct train`` compares."""

POWERSGD_RANKS = {"powersgd-1": 1, "powersgd-2": 2, "powersgd-4": 4}
"""Torch's PowerSGD by the rank of its approximation."""
HOOKS = ("fp16", *POWERSGD_RANKS)
"""Hooks of torch's DDP."""
BACKENDS = ("dense", "dct", *HOOKS)
BOTH = ("dense", "dct")
"""The default."""


def parse_backends(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names in comma-separated ``texts``, each once, in order; "both" stands for BOTH.

    Raises ``ValueError`` for another name.
    """
    names: list[str] = []
    for name in (name.strip() for text in texts for name in text.split(",")):
        if name not in (*BACKENDS, "both"):
            raise ValueError(f"{name!r} is not one of {', '.join(map(repr, (*BACKENDS, 'both')))}")
        names += BOTH if name == "both" else (name,)
    return tuple(dict.fromkeys(names))
