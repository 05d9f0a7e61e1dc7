"""Compiles a variant of a graph for each phase of a training (options ``start_iter``, ``density_warmup``): payloads have static shapes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from dct_compile.compiler.exchanges import begin_count
from dct_compile.compiler.graph import Compiled, GraphCompiler, Settings
from dct_compile.phases import Phase, phase_at, phases_of
from dct_compile.state.exchanges import exchanges_of


def compile_phases(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings, *, reduced_outside: bool) -> Compiled:
    """Compiles one Dynamo graph; where it compresses gradients, once for each phase.

    A call takes the variant of the phase that its parameters are in. All are compiled at once, because what one of them assumes about the
    inputs can be guarded only while Dynamo compiles. The last phase comes first: only it tells whether the others are needed.

    Args:
        gm: The graph.
        example_inputs: Its inputs.
        settings: The settings, with the options of the whole training.
        reduced_outside: Whether something outside of the graph averages gradients.

    Returns:
        The compiled graph, to be called with the graph's own inputs.
    """
    phases = phases_of(settings.config)
    if len(phases) == 1:
        return GraphCompiler(gm, example_inputs, settings, reduced_outside=reduced_outside).run()
    variants: dict[int, Compiled] = {}
    last: GraphCompiler | None = None
    for phase in reversed(phases):
        own = replace(settings, config=phase.config, options=settings.config, until=phase.until)
        compiler = GraphCompiler(gm, example_inputs, own, reduced_outside=reduced_outside)
        variants[phase.first] = compiler.run()
        last = last or compiler
        if not last.requests:
            return variants[phase.first]
        if compiler.first_use.entry is not None:
            compiler.first_use.entry.of_phase = True
    assert last is not None
    return _by_phase(variants, phases, last, settings)


def _by_phase(variants: dict[int, Compiled], phases: tuple[Phase, ...], last: GraphCompiler, settings: Settings) -> Compiled:
    positions = sorted({position for request in last.requests for position in request.positions})
    uses, averaging = settings.runtime.states.use, [item.exchange for item in last.decisions if item.exchange.segments]

    trains_later = last.trains_later

    def run(*args: Any) -> Any:
        parameters = [args[position] for position in positions]
        phase = phase_at(phases, exchanges_of(uses.of(parameters)))
        if not trains_later:  # the graph itself exchanges
            begin_count(parameters, averaging, settings.config, settings.runtime)
        return variants[phase.first](*args)

    return run
