"""Describes one exchange between ranks as plain values: no graph, no tensor, no process group.

The passes make an :class:`Exchange` of every collective of a graph; an integration makes one of every collective that lives outside of
graphs. A scheme looks at nothing else when it makes its offer.
"""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

import torch
from torch.distributed import ProcessGroup

from dct_compile.element_order import ElementOrder
from dct_compile.labels import site_label
from dct_compile.traffic import Traffic, once, one_share_to_each, share_leaving, to_all

GRADIENT, ACTIVATION, EMBEDDING, OTHER = "gradient", "activation", "embedding", "other"
BUFFERS = "buffers"
"""The kind of DDP's broadcast of buffers, which is outside of graphs."""
PARAMETER, SHARDED_GRADIENT = "parameter", "sharded_gradient"
"""The kinds of sharded data parallelism: the all_gather of parameter shards, and the reduce_scatter of their gradients."""
BACKWARD_OF = {ACTIVATION: "activation_gradient", EMBEDDING: "embedding_gradient", PARAMETER: SHARDED_GRADIENT}
"""The kind of the exchange that carries the gradient of one of these."""
ALL_GATHER, ALL_TO_ALL, ALL_REDUCE = "all_gather_into_tensor", "all_to_all_single", "all_reduce"
RECTIFIED, FOREIGN, UNKNOWN = "rectified", "foreign", "computed"
"""Origins of an input beside :data:`EMBEDDING` and :data:`PARAMETER`: a ReLU or its kin, what no graph shows, whatever else is computed."""
FILLED, COUNTED = "filled", "counted"
"""Origins of what stays exact: rows with large numbers of a mask; counts, truth values and one number for each row."""
SEND = "send"
"""A message from one rank to another, which is outside of graphs."""
COMPUTED, RETURNED, STORED = "computed", "returned", "stored"
"""The destinations of a result: computed with, returned by the graph, or written to one of its inputs."""
COMPRESSIBLE = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that schemes carry."""


@dataclass(frozen=True)
class Collective:
    """A collective operation; ``passes/collectives.py`` has the table of all.

    ``sums``: whether it adds up the inputs of the ranks. ``carrier``: the collective that carries its input once that is encoded,
    :data:`ALL_GATHER`, :data:`ALL_TO_ALL` or :data:`SEND`, empty where no scheme carries it. ``backward``: the collective that carries its
    gradient. ``sent``: its traffic by input bytes and ranks.
    """

    name: str
    sums: bool
    carrier: str
    backward: str
    sent: Callable[[int, int], Traffic]


@dataclass(frozen=True)
class Parameter:
    """A parameter: its position among the inputs of a graph or the members of a bucket, its name, and its shape on this rank.

    ``order``: the order of its elements in the gradient buffer; ``None`` for row-major.
    """

    position: int
    name: str
    shape: tuple[int, ...]
    order: ElementOrder | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Segment:
    """The gradient of ``parameter`` at ``offset`` of a gradient buffer (in elements)."""

    parameter: Parameter
    offset: int


def segments_of(parameters: Sequence[Parameter]) -> tuple[Segment, ...]:
    """Returns the segments of a buffer in which the gradients of ``parameters`` lie end to end."""
    ends = accumulate(parameter.numel for parameter in parameters)
    return tuple(Segment(parameter, end - parameter.numel) for parameter, end in zip(parameters, ends, strict=True))


@dataclass(frozen=True)
class Exchange:
    """One collective between the ranks of a group.

    ``kind``: "gradient", "activation", "embedding", "parameter", the gradient of one of the latter three (:data:`BACKWARD_OF`),
    or "other". ``name``: the parameters that it carries, or whose gradient, else the source line. ``shape``: of the
    input, ``None`` where it is unknown; a leading size that is dynamic is the traced example's. ``static_rows``: whether all sizes but the
    leading one are static; ``static_width``: whether the last one is. ``reduce_op``: "sum", "avg", ..., empty where nothing is reduced.
    ``splits``: the static input splits of an uneven all_to_all. ``segments``: whose gradients a buffer holds; with shards, the part of each
    parameter in the buffer of one rank. ``number``: the place among the sites of its graph. ``module``: the path of the module that issued
    it, and ``source``: its source line, as "/path/model.py:12", by which the option ``exempt`` finds it too.

    ``origin``: the source of the input, as far as the graph shows: :data:`EMBEDDING`, :data:`PARAMETER`, :data:`RECTIFIED`,
    :data:`FILLED`, :data:`COUNTED`, :data:`FOREIGN` (not visible) or :data:`UNKNOWN`.
    ``destination``: where the result goes: :data:`COMPUTED`, :data:`RETURNED` or :data:`STORED`. ``operator``: the higher-order operator in
    whose subgraph it stands, empty for the graph itself.
    ``trains``: whether a backward belongs to it. ``backward``: the exchange of that backward; ``None`` where it sends nothing.
    ``local_gradient``: whether the gradient of the input was found on this rank, for an exchange whose backward sends nothing.
    ``unpaired``: whether the graph has a backward exchange of the same group whose forward is not known.
    ``waited``: whether its result is used only after a wait; ``used``: whether there is a wait. ``may_be_unused``: whether a step may leave
    out parameters (DDP's ``find_unused_parameters``). ``uneven``: whether the graph gathers shards of unequal lengths.
    ``per_host``: ranks that share a host, one after the other; 1 where that is not known. ``start_s``: seconds that it takes to encode
    it, however few its bytes are.
    """

    collective: Collective
    kind: str
    name: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    group: str
    ranks: int
    rank: int
    input_bytes: int
    reduce_op: str = ""
    splits: tuple[int, ...] | None = None
    static_rows: bool = True
    static_width: bool = True
    segments: tuple[Segment, ...] = ()
    number: int = 0
    module: str = ""
    source: str = ""
    origin: str = UNKNOWN
    destination: str = COMPUTED
    operator: str = ""
    trains: bool = True
    backward: "Exchange | None" = None
    local_gradient: bool = False
    unpaired: bool = False
    waited: bool = True
    used: bool = True
    may_be_unused: bool = False
    uneven: bool = False
    per_host: int = 1
    start_s: float = 0.0

    @property
    def segment_bytes(self) -> list[int]:
        """Bytes of each segment."""
        return [segment.parameter.numel * self.dtype.itemsize for segment in self.segments] if self.dtype is not None else []

    @property
    def label(self) -> str:
        """A short form of ``name``, for code and profiles."""
        return site_label(self.name, self.kind)

    @property
    def divisor(self) -> int:
        """The number by which a sum over the ranks is divided."""
        return self.ranks if self.reduce_op == "avg" else 1

    @property
    def width(self) -> int:
        """Elements of a row: the last dimension."""
        assert self.shape
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows: vectors of the last dimension."""
        assert self.shape
        return prod(self.shape[:-1])

    @property
    def dense_traffic(self) -> Traffic:
        """The traffic of the untouched collective."""
        return self.sent_by_all_to_all(self.input_bytes) if self.splits else self.collective.sent(self.input_bytes, self.ranks)

    def sent_encoded(self, payload_bytes: int) -> Traffic:
        """Returns the traffic of an encoded input of ``payload_bytes``, carried by the collective's carrier."""
        if self.collective.carrier == ALL_GATHER:
            return to_all(payload_bytes, self.ranks)
        return self.sent_by_all_to_all(payload_bytes)

    def sent_by_all_to_all(self, input_bytes: int) -> Traffic:
        """Returns the traffic of an all_to_all of ``input_bytes``, split as this exchange is; of one message where that is the carrier."""
        if self.collective.carrier == SEND:
            return once(input_bytes, self.ranks)
        even = one_share_to_each(input_bytes, self.ranks)
        return even if self.splits is None else replace(even, wire=input_bytes * share_leaving(self.splits, self.rank))

    def matches(self, pattern: str) -> bool:
        """Returns whether a pattern matches the name, short name, module path or source line.

        The name holds code, in which a bracket is no pattern, and so it is compared as it is. A source line may lack leading folders.
        """
        places = [place for place in (self.label, self.module, self.source) if place]
        return self.name == pattern or any(fnmatch.fnmatchcase(place, wanted) for place in places for wanted in (pattern, f"*/{pattern}"))

    def canonical(self) -> "Exchange":
        """Returns this exchange with one row and even splits: what the ranks see alike, whatever their batches are."""
        if self.kind in (GRADIENT, PARAMETER, SHARDED_GRADIENT) or not self.shape or self.dtype is None:
            return self
        return replace(
            self, shape=(1,) * (len(self.shape) - 1) + self.shape[-1:], input_bytes=self.width * self.dtype.itemsize, splits=None
        )

    def key(self) -> str:
        """What is equal on all ranks of the group and does not depend on the number of rows, as text."""
        sizes = [segment.parameter.numel for segment in self.segments] or list((self.shape or ())[1:])
        dtype = str(self.dtype).removeprefix("torch.") if self.dtype is not None else "unknown"
        phase = "training" if self.trains else "evaluation"
        return f"{self.collective.name} {self.kind} {dtype} [{','.join(map(str, sizes))}] {self.reduce_op} {phase}".replace("  ", " ")


def gradient_exchange(
    all_reduce: Collective,
    segments: tuple[Segment, ...],
    dtype: torch.dtype,
    group: ProcessGroup,
    may_be_unused: bool = False,
    per_host: int = 1,
    start_s: float = 0.0,
) -> Exchange:
    """Describes the averaging of a gradient buffer over ``group``, for a buffer whose layout is known before any graph.

    Args:
        all_reduce: the row of that collective in the table of collectives.
        segments: the parameters of the buffer, end to end.
        dtype: dtype of the buffer.
        group: the ranks that average.
        may_be_unused: whether a step may leave out parameters.
        per_host: ranks that share a host.
        start_s: seconds that it takes to encode the buffer, however small it is.
    """
    numel = sum(segment.parameter.numel for segment in segments)
    return Exchange(
        all_reduce,
        GRADIENT,
        ", ".join(segment.parameter.name for segment in segments),
        (numel,),
        dtype,
        group.group_name,
        group.size(),
        group.rank(),
        numel * dtype.itemsize,
        reduce_op="avg",
        segments=segments,
        may_be_unused=may_be_unused,
        per_host=per_host,
        start_s=start_s,
    )
