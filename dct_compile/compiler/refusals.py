"""Refuses ways of generating code that cannot hold what takes the place of a collective."""

from collections.abc import Sequence

from dct_compile.passes.decision import Decision

_DENSE = "leave them dense (options 'exempt', 'mp_density': 1, 'dp_density': 1, 'embedding_codec': 'dense')"


def refuse_ahead_of_time(decisions: Sequence[Decision], averages: bool) -> None:
    """Raises ``RuntimeError`` where a saved graph would lack what happens around it in this process."""
    chosen = _compressed(decisions)
    if averages:
        raise RuntimeError("aot_compile cannot save a graph with option 'data_parallel': parameters are made equal when it first runs")
    if chosen:
        raise RuntimeError(
            f"aot_compile cannot save a graph with compressed exchanges, on which the ranks must agree when it first runs: {chosen}. "
            f"Call the compiled model instead, or {_DENSE}"
        )


def refuse_cpp_wrapper(decisions: Sequence[Decision]) -> None:
    """Raises ``ValueError`` where Inductor's C++ wrapper would have to call the operators of this project."""
    chosen = _compressed(decisions)
    if chosen:
        raise ValueError(
            "option 'cpp_wrapper' is True (an option of Inductor, or torch._inductor.config.cpp_wrapper, or TORCHINDUCTOR_CPP_WRAPPER=1):"
            f" its C++ wrapper cannot call the operators of these compressed exchanges: {chosen}. Set it to False, or {_DENSE}"
        )


def _compressed(decisions: Sequence[Decision]) -> list[str]:
    return [decision.exchange.label for decision in decisions if decision.compressed]
