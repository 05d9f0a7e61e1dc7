"""The parts of a report: plain values, no graph and no process group."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class SiteReport:
    """One collective.

    ``kind``: one of ``page.KINDS``, where "parameter" and "sharded_gradient" are about shards and "buffers" are of DDP. ``name``:
    the parameters or buffers that it is about, else the source line. ``decision``: "compressed" or "dense", for ``reason``.
    ``dense_bytes``, ``wire_bytes``: sent per rank and call before and after, metadata and padding included. ``density``: fraction of the
    elements sent so far (for row thresholds: of a row's elements that its payload holds). ``overflow``: entries above the threshold that
    found no room in a payload so far; error feedback keeps them in the residual. ``stepped``: how the last optimizer step has treated the
    parameters of a compressed gradient, see :attr:`dct_compile.state.gradient_use.Use.stepped`, or "not stepped yet"; each way with the
    number of its parameters where there are several. ``None`` before the first exchange, and elsewhere.

    ``offers``: what each scheme would send, in bytes; empty where no offer was turned down. ``source``: the user's line as ``path:line``,
    empty where the trace holds none. ``graph``: the position in the report's ``graphs``; ``number``: the place among the sites of that
    graph; ``pair``: the number of the site's twin, the backward of a forward collective or the other way round. ``calls``: how often one
    step runs it, 0 where a later compilation has taken its place. ``training``: whether its graph has a backward. ``seconds``,
    ``dense_seconds``: predicted per call, where nothing else runs; ``None`` where the link was not looked at. ``hops``: messages of which
    each waits for the one before; ``memory_bytes``: read and written by the kernels; ``inside_bytes``: sent to other ranks of the host, not
    among ``wire_bytes``; all per call.
    """

    collective: str
    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    decision: str
    reason: str
    dense_bytes: int
    wire_bytes: int
    group: str
    group_size: int
    density: float | None = None
    overflow: int | None = None
    offers: Mapping[str, int] = field(default_factory=dict)
    source: str = ""
    graph: int = 0
    number: int = 0
    pair: int | None = None
    calls: int = 1
    training: bool = True
    stepped: str | None = None
    seconds: float | None = None
    dense_seconds: float | None = None
    hops: int = 0
    memory_bytes: int = 0
    inside_bytes: int = 0

    @property
    def ratio(self) -> float | None:
        """Dense bytes over bytes sent; ``None`` where nothing is sent."""
        return self.dense_bytes / self.wire_bytes if self.wire_bytes else None

    @property
    def place(self) -> str:
        """``source`` without its folders."""
        return Path(self.source).name


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node of a graph, in graph order.

    ``operator``: the operator's overload, or "placeholder" or "output". ``inputs``: the names of the nodes it reads. ``shape``, ``dtype``
    and ``size`` (bytes) are those of its result, by the traced example where sizes are symbolic; ``None``, empty and 0 where it is not one
    tensor. ``source``, ``code``: the user's line as ``path:line`` and its text. ``site``: the number of the site that it belongs to.
    ``backward``: whether it depends on a gradient that the graph is given.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...] | None
    dtype: str
    size: int
    source: str
    code: str
    site: int | None
    backward: bool


@dataclass(frozen=True)
class GraphReport:
    """A rewritten graph before and after: as readable code, and node by node (empty where DDP reduces outside of every graph)."""

    name: str
    before: str
    after: str
    nodes_before: tuple[NodeReport, ...] = ()
    nodes_after: tuple[NodeReport, ...] = ()


@dataclass(frozen=True)
class Sums:
    """Bytes that a rank sends, over several sites: ``dense`` without compression, ``wire`` with it."""

    dense: int
    wire: int

    @classmethod
    def of(cls, sites: Iterable[SiteReport]) -> "Sums":
        """Adds up the sites, each as often as a step runs it."""
        counted = [(site.calls * site.dense_bytes, site.calls * site.wire_bytes) for site in sites]
        return cls(sum(dense for dense, _ in counted), sum(wire for _, wire in counted))


def step_and_evaluation(sites: Iterable[SiteReport]) -> tuple[Sums, Sums | None]:
    """Returns the bytes of one training step, and those of one evaluation (``None`` where nothing is evaluated).

    Where no graph trains, a step is one call of the model.
    """
    sites = list(sites)
    training, evaluation = ([site for site in sites if site.training is flag] for flag in (True, False))
    if not training:
        return Sums.of(evaluation), None
    return Sums.of(training), Sums.of(evaluation) if evaluation else None


@dataclass(frozen=True)
class DeferredGraph:
    """A graph whose description costs time, and disturbs other threads: it is made when somebody looks. ``describe``: makes it."""

    name: str
    describe: Callable[[], GraphReport]
