"""Notes that a wrapper is attached to with the options of one graph, where another graph has others."""

from collections.abc import Sequence

from dct_compile.config import DCTConfig
from dct_compile.reasons import Note
from dct_compile.runtime import Runtime


def note_other_options(name: str, wrapper: str, first: DCTConfig, other: DCTConfig, more: Sequence[str], runtime: Runtime) -> None:
    """Notes the options for gradients that differ between the graph that ran first inside of a module and another one.

    Args:
        name: The name of the module's class.
        wrapper: "DDP" or "FSDP".
        first: The options of the graph that ran first.
        other: The options of the other one.
        more: The names of further options that count.
        runtime: Where to report.
    """
    values, others = ({**config.for_gradients(), **{option: getattr(config, option) for option in more}} for config in (first, other))
    names = [option for option in values if values[option] != others[option]]
    differences = [f"option {option!r} is {values[option]!r} there and {others[option]!r} in another graph" for option in names]
    if differences:
        runtime.warn_once(Note.OTHER_OPTIONS.format(module=name, wrapper=wrapper, differences="; ".join(differences)))
