"""What a collective sends, in bytes per rank and call."""

from collections.abc import Sequence

from dct_compile.triton_kernels.layout import GradientLayout


def sent_bytes(collective: str, input_bytes: int, group_size: int) -> int:
    """Bytes that one rank puts on the wire when the collective's input on that rank is ``input_bytes`` long.

    all_reduce and reduce_scatter are counted as rings (the fewest bytes possible), all_gather and all_to_all as direct sends, a broadcast
    as one pass; unknown collectives as their input.
    """
    others = group_size - 1
    if collective.startswith("all_reduce"):
        return 2 * others * input_bytes // group_size
    if collective.startswith("all_gather"):
        return others * input_bytes
    if collective.startswith(("reduce_scatter", "all_to_all")):
        return others * input_bytes // group_size
    return input_bytes if others else 0


def share_leaving(splits: Sequence[int], own: int) -> float:
    """The fraction of an uneven all_to_all's rows that leave this rank."""
    total = sum(splits)
    return (total - splits[own]) / total if total else 0.0


def gather_bytes(layout: GradientLayout, group_size: int) -> int:
    """The "gather" scheme: every rank sends its payload to all others (grows with the number of ranks)."""
    return (group_size - 1) * layout.payload_bytes


def owner_bytes(layout: GradientLayout, group_size: int) -> int:
    """The "owner" scheme: one chunk to every owner, then the owned chunk to everybody (less than two payloads, however many ranks)."""
    return 2 * (group_size - 1) * layout.chunk_bytes
