"""Sites of graphs of one collective, made without tracing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dct_compile.config import DCTConfig
from dct_compile.exchange import Parameter, Segment, segments_of
from dct_compile.passes.collectives import collective_of
from dct_compile.passes.decision import Decision
from dct_compile.passes.graph_utils import WAIT
from dct_compile.passes.plan import plan
from dct_compile.passes.sites import Site

c10d = torch.ops._c10d_functional
OVERLOADS = {
    "all_to_all_single": c10d.all_to_all_single.default,
    "all_gather_into_tensor": c10d.all_gather_into_tensor.default,
    "reduce_scatter_tensor": c10d.reduce_scatter_tensor.default,
    "all_reduce": c10d.all_reduce.default,
    "broadcast": c10d.broadcast.default,
    "all_reduce_coalesced": c10d.all_reduce_coalesced.default,
}


def make_site(
    collective: str = "all_to_all_single",
    shape: Sequence[int] = (16, 64),
    dtype: torch.dtype = torch.float32,
    kind: str = "activation",
    origin: str = "rectified",
    ranks: int = 4,
    rank: int = 0,
    op: str = "sum",
    splits: Sequence[int] | None = None,
    twin: Site | None = None,
    segments: tuple[Segment, ...] = (),
) -> Site:
    """A waited collective on an input of ``shape``."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["val"] = torch.empty(shape, dtype=dtype)
    even = [shape[0] // ranks] * ranks if splits is None else list(splits)
    arguments: dict[str, tuple[Any, ...]] = {
        "all_to_all_single": (even, even, "0"),
        "all_gather_into_tensor": (ranks, "0"),
        "reduce_scatter_tensor": (op, ranks, "0"),
        "all_reduce": (op, "0"),
        "broadcast": (0, "0"),
        "all_reduce_coalesced": (op, "0"),
    }
    node = graph.call_function(OVERLOADS[collective], (x, *arguments[collective]))
    graph.output((graph.call_function(WAIT, (node,)),))
    found = collective_of(node)
    assert found is not None
    return Site(node, found, kind, origin, "here", x, "0", ranks, rank, twin, segments)


def make_gradient(*numels: int, **changes: Any) -> Site:
    """The all_reduce of a bucket of parameters p0, p1, ... of these sizes."""
    segments = segments_of([Parameter(i, f"p{i}", (numel,)) for i, numel in enumerate(numels)])
    given = {"collective": "all_reduce", "shape": (sum(numels),), "kind": "gradient", "op": "avg", "segments": segments, **changes}
    return make_site(**given)


def decide(site: Site, training: bool = True, **options: Any) -> Decision:
    return plan([site], DCTConfig(**options), training)[0]
