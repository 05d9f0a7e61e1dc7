"""The plan: every reason to leave a site dense, and every byte it promises, on sites made by hand."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dct_compile import cost
from dct_compile.config import DCTConfig
from dct_compile.passes.graph_utils import WAIT
from dct_compile.passes.plan import Decision, plan
from dct_compile.passes.sites import Parameter, Segment, Site
from tests.small_models import Weighted, c10d, exchange, gather, ids, leaf
from tests.tracing import trace

OVERLOADS = {
    "all_to_all_single": c10d.all_to_all_single.default,
    "all_gather_into_tensor": c10d.all_gather_into_tensor.default,
    "reduce_scatter_tensor": c10d.reduce_scatter_tensor.default,
    "all_reduce": c10d.all_reduce.default,
    "broadcast": c10d.broadcast.default,
}


def make_site(
    collective: str = "all_to_all_single",
    shape: Sequence[int] = (16, 64),
    dtype: torch.dtype = torch.float32,
    kind: str = "activation",
    origin: str = "computed",
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
    }
    node = graph.call_function(OVERLOADS[collective], (x, *arguments[collective]))
    graph.output((graph.call_function(WAIT, (node,)),))
    return Site(node, collective, kind, origin, "here", x, "0", ranks, rank, twin, segments)


def make_gradient(*numels: int, **changes: Any) -> Site:
    """The all_reduce of a bucket of parameters p0, p1, ... of these sizes."""
    offsets = [sum(numels[:i]) for i in range(len(numels))]
    segments = tuple(Segment(Parameter(i, f"p{i}", numel), offsets[i]) for i, numel in enumerate(numels))
    given = {"collective": "all_reduce", "shape": (sum(numels),), "kind": "gradient", "op": "avg", "segments": segments, **changes}
    return make_site(**given)


def decide(site: Site, training: bool = True, **options: Any) -> Decision:
    return plan([site], DCTConfig(**options), training)[0]


FORWARD_REASONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a group of one rank sends nothing": ({"ranks": 1}, {}),
    "broadcast is not compressed": ({"collective": "broadcast"}, {}),
    "dtype int64 is not compressed (float32, bfloat16 and float16 are)": ({"dtype": torch.int64, "kind": "other"}, {}),
    "dtype float64 is not compressed (float32, bfloat16 and float16 are)": ({"dtype": torch.float64}, {}),
    "reduce operation 'max' is not compressed (sum and avg are)": ({"collective": "all_reduce", "op": "max"}, {}),
    "reduce operation 'min' is not compressed (sum and avg are)": ({"collective": "reduce_scatter_tensor", "op": "min"}, {}),
    "no forward collective has this one as its backward, so there is no mask to reuse": ({"kind": "activation_gradient"}, {}),
    "carries parameters, not activations": ({"kind": "other", "origin": "parameter"}, {}),
    "its input was computed outside of this graph, so an embedding exchange cannot be told from an activation": ({"origin": "foreign"}, {}),
    "a tensor of fewer than two dimensions has no rows": ({"shape": (64,)}, {}),
    "rows of 16385 elements are wider than 16384": ({"shape": (4, 16385)}, {}),
    "embedding_codec='dense'": ({"kind": "embedding"}, {"embedding_codec": "dense"}),
    "int8 rows of 2 elements are not smaller than dense ones": ({"kind": "embedding", "shape": (16, 2), "dtype": torch.bfloat16}, {}),
    "int4 rows of 1 elements are not smaller than dense ones": (
        {"kind": "embedding", "shape": (16, 1), "dtype": torch.bfloat16},
        {"embedding_codec": "int4"},
    ),
    "mp_density=1 keeps everything": ({}, {"mp_density": 1}),
    "rows of 8 elements are too short for mp_density=0.05": ({"shape": (16, 8)}, {}),
    "a row would take 290 bytes, 256 when dense": ({}, {"mp_density": 0.9, "mp_value_dtype": "float32"}),
    "a row would take 12 bytes, 128 when dense": ({"dtype": torch.bfloat16, "collective": "all_reduce", "ranks": 22}, {}),
    "the gradient of its input could not be found, so it could not be masked": ({"collective": "all_reduce"}, {}),
}


@pytest.mark.parametrize("reason", FORWARD_REASONS)
def test_forward_left_dense(reason: str) -> None:
    changes, options = FORWARD_REASONS[reason]
    decision = decide(make_site(**changes), training="22" not in str(changes), **options)
    assert (decision.codec, decision.reason) == ("dense", reason)
    assert decision.wire_bytes == decision.dense_bytes


def test_evaluation_is_left_dense_on_request_only() -> None:
    assert decide(make_site(), training=False, mp_eval=False).reason == "mp_eval=False leaves evaluation dense"
    assert decide(make_site(), training=False).codec == "mask"
    assert decide(make_site(), training=True, mp_eval=False).codec == "mask"


def test_unwaited_result_is_left_dense() -> None:
    site = make_site()
    with site.node.graph.inserting_after(site.node):
        site.node.graph.call_function(torch.ops.aten.neg.default, (site.node,))
    assert decide(site).reason == "its result is used before it was waited for"


def test_unknown_shape_is_left_dense() -> None:
    site = make_site()
    assert site.input is not None
    del site.input.meta["val"]
    decision = decide(site)
    assert (decision.reason, decision.dense_bytes) == ("the shape of the input is unknown", 0)


def test_dynamic_width_is_left_dense() -> None:
    x = leaf(16, 64)
    torch._dynamo.mark_dynamic(x, 1)
    reason = "the width of a row is dynamic"
    assert trace(lambda x: exchange(x.relu()), x).reasons == [reason, f"its forward is dense: {reason}"]


MISMATCHES: dict[str, dict[str, Any]] = {
    "its backward is all_to_all_single, expected reduce_scatter_tensor": {"collective": "all_to_all_single", "shape": (64, 64)},
    "its backward carries rows of another shape": {"shape": (64, 32)},
    "its backward has dtype float64": {"dtype": torch.float64, "shape": (64, 64)},
}


@pytest.mark.parametrize("reason", MISMATCHES)
def test_both_stay_dense_when_the_backward_does_not_match(reason: str) -> None:
    forward = make_site("all_gather_into_tensor")
    given = {"collective": "reduce_scatter_tensor", **MISMATCHES[reason]}
    backward = make_site(**given, kind="activation_gradient", twin=forward)
    assert [item.reason for item in plan([forward, backward], DCTConfig(), True)] == [reason, f"its forward is dense: {reason}"]


# 64 ranks, gather: 406 entries of 3 bytes and 16 blocks, 1236 bytes to 63 ranks. Owner: 902 entries of 5 bytes and 4 blocks, 4516 bytes,
# twice to 3 ranks.
GRADIENT_REASONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a group of one rank sends nothing": ({"ranks": 1}, {}),
    "dtype float64 is not compressed (float32, bfloat16 and float16 are)": ({"dtype": torch.float64}, {}),
    "reduce operation 'max' is not compressed (sum and avg are)": ({"op": "max"}, {}),
    "reduce_scatter_tensor of a gradient is not compressed": ({"collective": "reduce_scatter_tensor"}, {}),
    "compiled autograd's graph does not say whose gradient this is; use DDP's default reducer": ({"segments": ()}, {}),
    "dp_density=1 keeps everything": ({}, {"dp_density": 1}),
    "exempt by pattern 'p?'": ({}, {"exempt": ["q*", "p?"]}),
    "fewer than min_numel=5000 elements": ({}, {"min_numel": 5000}),
    "gather with 64 ranks would send 77868 bytes, dense sends 32256": ({"ranks": 64}, {"dp_density": 0.09, "all_reduce": "gather"}),
    "owner with 4 ranks would send 27096 bytes, dense sends 24576": (
        {"ranks": 4},
        {"dp_density": 0.8, "dp_value_dtype": "float32", "all_reduce": "owner"},
    ),
}


@pytest.mark.parametrize("reason", GRADIENT_REASONS)
def test_gradient_left_dense(reason: str) -> None:
    changes, options = GRADIENT_REASONS[reason]
    decision = decide(make_gradient(4096, **changes), **options)
    assert (decision.codec, decision.reason) == ("dense", reason)


def test_every_reason_of_a_bucket_is_given_once() -> None:
    decision = decide(make_gradient(64, 64, 4096), exempt=["p2"])
    assert decision.reason == "fewer than min_numel=128 elements; exempt by pattern 'p2'"


ACTIVATION_BYTES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, int, int]] = {
    # 4 of 64 kept: 4 * (2 + 1) = 12 bytes a row, 192 for 16 rows; three quarters of it leave the rank. Dense: 4096 bytes.
    "all_to_all": ("all_to_all_single", {}, {}, 4, 3072, 144),
    "all_gather": ("all_gather_into_tensor", {}, {}, 4, 3 * 4096, 3 * 192),
    "reduce_scatter": ("reduce_scatter_tensor", {}, {}, 4, 3072, 144),
    "all_reduce": ("all_reduce", {}, {}, 4, 6144, 3 * 192),
    "all_reduce on two ranks": ("all_reduce", {"ranks": 2}, {}, 4, 4096, 192),
    "uneven": ("all_to_all_single", {"splits": [8, 0, 4, 4]}, {}, 4, 2048, 96),
    "uneven, second rank": ("all_to_all_single", {"splits": [8, 0, 4, 4], "rank": 1}, {}, 4, 4096, 192),
    "no rows": ("all_to_all_single", {"shape": (0, 64)}, {}, 4, 0, 0),
    "float32 values": ("all_to_all_single", {}, {"mp_value_dtype": "float32"}, 4, 3072, 16 * 4 * 5 * 3 // 4),
    "laplace has room for 10 % more": ("all_to_all_single", {}, {"threshold": "laplace"}, 5, 3072, 16 * 5 * 3 * 3 // 4),
    "fixed has room for 10 % more": ("all_to_all_single", {}, {"threshold": 0.5}, 5, 3072, 16 * 5 * 3 * 3 // 4),
    "sampled is exact here": ("all_to_all_single", {}, {"threshold": "sampled"}, 4, 3072, 144),
    "two-byte indices": ("all_to_all_single", {"shape": (16, 300)}, {}, 15, 14400, 16 * 15 * 4 * 3 // 4),
    "three dimensions": ("all_to_all_single", {"shape": (16, 2, 64)}, {}, 4, 6144, 288),
    "bfloat16 input": ("all_to_all_single", {"dtype": torch.bfloat16}, {}, 4, 1536, 144),
}


@pytest.mark.parametrize("name", ACTIVATION_BYTES)
def test_bytes_of_a_masked_site(name: str) -> None:
    collective, changes, options, slots, dense_bytes, wire_bytes = ACTIVATION_BYTES[name]
    decision = decide(make_site(collective, **changes), training=False, **options)
    assert decision.codec == "mask"
    assert (decision.slots, decision.dense_bytes, decision.wire_bytes) == (slots, dense_bytes, wire_bytes)


@pytest.mark.parametrize(
    ("collective", "backward", "shape", "dense_bytes", "wire_bytes"),
    [
        ("all_to_all_single", "all_to_all_single", (16, 64), 3072, 96),  # 16 * 4 values of 2 bytes, no index
        ("all_gather_into_tensor", "reduce_scatter_tensor", (64, 64), 12288, 384),
        ("reduce_scatter_tensor", "all_gather_into_tensor", (4, 64), 3072, 96),
        ("all_reduce", "all_reduce", (16, 64), 6144, 384),
    ],
)
def test_bytes_of_a_masked_backward(collective: str, backward: str, shape: tuple[int, int], dense_bytes: int, wire_bytes: int) -> None:
    forward = make_site(collective)
    gradient = make_site(backward, shape, kind="activation_gradient", twin=forward)
    decision = plan([forward, gradient], DCTConfig(), True)[1]
    assert (decision.codec, decision.reason) == ("mask", "the forward's mask, values only")
    assert (decision.slots, decision.dense_bytes, decision.wire_bytes) == (4, dense_bytes, wire_bytes)


@pytest.mark.parametrize(
    ("codec", "bits", "wire_bytes"),
    [("int8", 8, 16 * (2 + 64) * 3 // 4), ("int4", 4, 16 * (2 + 32) * 3 // 4)],
)
def test_embeddings_are_quantised_both_ways(codec: str, bits: int, wire_bytes: int) -> None:
    forward = make_site(kind="embedding", origin="embedding")
    backward = make_site(kind="embedding_gradient", twin=forward)
    for decision in plan([forward, backward], DCTConfig(embedding_codec=codec, mp_density=1), True):
        assert (decision.codec, decision.bits, decision.slots) == ("quantize", bits, 0)
        assert (decision.reason, decision.wire_bytes) == (f"{codec} rows with stochastic rounding", wire_bytes)


def test_embeddings_are_masked_on_request() -> None:
    forward = make_site(kind="embedding", origin="embedding")
    backward = make_site(kind="embedding_gradient", twin=forward)
    decisions = plan([forward, backward], DCTConfig(embedding_codec="threshold"), True)
    assert [(item.codec, item.slots) for item in decisions] == [("mask", 4), ("mask", 4)]


# density .01 of 4096 elements: at most 46 entries (capacity_factor 1.1), 3 bytes each, and 16 blocks of 1 byte: 154, padded to 156.
# Owner: 2, 4 or 64 chunks of 23, 12 or 3 entries and 8, 4 or 1 blocks: 77, 40 or 10 bytes, padded to 80, 40 or 12; sent twice.
@pytest.mark.parametrize(
    ("ranks", "gather_bytes", "owner_bytes", "dense_bytes"),
    [(2, 156, 2 * 80, 16384), (4, 3 * 156, 6 * 40, 24576), (64, 63 * 156, 126 * 12, 32256)],
)
def test_gather_or_owner_whichever_sends_less(ranks: int, gather_bytes: int, owner_bytes: int, dense_bytes: int) -> None:
    found = {choice: decide(make_gradient(4096, ranks=ranks, rank=1), all_reduce=choice) for choice in ("gather", "owner", "auto")}
    assert {choice: item.wire_bytes for choice, item in found.items()} == {
        "gather": gather_bytes,
        "owner": owner_bytes,
        "auto": min(gather_bytes, owner_bytes),
    }
    assert {item.dense_bytes for item in found.values()} == {dense_bytes}
    assert found["auto"].reason == ("gather, density 0.01" if ranks == 2 else "owner, density 0.01")
    gathered, owned = found["gather"].gradient, found["owner"].gradient
    assert gathered is not None
    assert owned is not None
    assert (gathered.layout.chunks, gathered.layout.chunk, gathered.owner_layout) == (1, -1, None)
    assert owned.owner_layout is not None
    assert (owned.layout.chunks, owned.layout.chunk, owned.owner_layout.chunks, owned.owner_layout.chunk) == (ranks, -1, ranks, 1)


def test_bucket_with_dense_members() -> None:
    decision = decide(make_gradient(64, 4096, 256, ranks=2), exempt=["p2"])
    plan_ = decision.gradient
    assert plan_ is not None
    assert decision.reason == "gather, density 0.01; dense: p0, p2"
    assert plan_.layout.segments == ((64, 4096),)
    assert [segment.parameter.name for segment in plan_.dense] == ["p0", "p2"]
    assert plan_.numel == 64 + 4096 + 256
    assert decision.wire_bytes == 156 + (64 + 256) * 4  # a ring all_reduce on two ranks sends its input once
    assert decision.dense_bytes == 4416 * 4


def test_layout_follows_the_options() -> None:
    options = {"dp_density": 0.001, "capacity_factor": 2.0, "dp_value_dtype": "float32"}
    decision = decide(make_gradient(10**6, ranks=2), **options)
    assert decision.gradient is not None
    layout = decision.gradient.layout
    assert (layout.block, layout.capacity_fraction, layout.value_dtype) == (4096, 0.002, torch.float32)
    assert decide(make_gradient(4096, ranks=2), dp_density=0.5, capacity_factor=4.0).gradient.layout.capacity_fraction == 1.0  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(64,), (16, 64), (16, 2, 64)])
def test_decisions_do_not_depend_on_the_batch(shape: tuple[int, ...]) -> None:
    def signatures(rows: int) -> list[str]:
        sites = [make_site(name, (rows, *shape[1:])) for name in ("all_to_all_single", "all_gather_into_tensor", "all_reduce")]
        sites.append(make_site(shape=(rows, *shape[1:]), kind="embedding", origin="embedding"))
        return [item.signature() for item in plan(sites, DCTConfig(), False)]

    assert signatures(4) == signatures(4096) == signatures(0)


def test_decisions_do_not_depend_on_the_rank() -> None:
    def signature(rank: int) -> str:
        return decide(make_gradient(64, 4096, rank=rank)).signature()

    assert signature(0) == signature(3) == "all_reduce gradient float32 [64,4096] gradient slots=0 bits=0"


def test_signatures_tell_decisions_apart() -> None:
    sites = [
        make_site(),
        make_site(shape=(16, 128)),
        make_site(dtype=torch.bfloat16),
        make_site("all_gather_into_tensor"),
        make_site(kind="embedding"),
    ]
    found = [decide(site).signature() for site in sites] + [decide(make_site(), mp_density=density).signature() for density in (0.1, 1)]
    assert found[0] == "all_to_all_single activation float32 [64] mask slots=4 bits=0"
    assert len(set(found)) == len(found)


def test_every_site_gets_its_decision_in_order() -> None:
    forward = make_site("all_gather_into_tensor")
    sites = [
        make_site(kind="other"),
        forward,
        make_gradient(4096),
        make_site("reduce_scatter_tensor", (64, 64), kind="activation_gradient", twin=forward),
        make_gradient(64),
    ]
    decisions = plan(sites, DCTConfig(), True)
    assert [decision.site for decision in decisions] == sites
    assert [decision.codec for decision in decisions] == ["dense", "mask", "gradient", "mask", "dense"]
    assert [decision.compressed for decision in decisions] == [False, True, True, True, False]


def test_a_forward_is_masked_only_together_with_its_backward() -> None:
    """[Gupta21]: what was not sent gets no gradient. Here the gradient of an exchanged parameter is its exchange's backward."""

    class Scaled(Weighted):
        def forward(self, x: torch.Tensor) -> Any:
            return x @ exchange(self.weight * 2)

    codecs = trace(Scaled(), torch.randn(16, 64)).codecs
    assert codecs in (["dense", "dense"], ["mask", "mask"])


class HandWritten(torch.autograd.Function):
    """An exchange with its backward written by hand, as model-parallel libraries do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return exchange(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return exchange(gradient)


class TwoHandWritten(torch.autograd.Function):
    """Two exchanges in one function: autograd gives them one sequence number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return exchange(x), exchange(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return exchange(gradients[0]), exchange(gradients[1])


def test_hand_written_exchanges_are_masked_only_together_with_their_backward() -> None:
    single = trace(lambda x: HandWritten.apply(x.relu()).sin(), leaf(16, 64))  # type: ignore[no-untyped-call]
    double = trace(lambda x, y: TwoHandWritten.apply(x.relu(), y.tanh())[0].sin() + y, leaf(16, 64), leaf(16, 64))  # type: ignore[no-untyped-call]
    for traced in (single, double):
        forward = [item.site for item in traced.decisions if item.codec == "mask" and item.site.kind == "activation"]
        masked = [item.site.twin for item in traced.decisions if item.codec == "mask" and item.site.kind == "activation_gradient"]
        assert len(forward) == len(masked)
        assert all(site in masked for site in forward)


@pytest.mark.parametrize(
    ("collective", "ranks", "sent"),
    [
        ("all_reduce", 4, 150),
        ("all_reduce_coalesced", 4, 150),
        ("all_gather_into_tensor", 4, 300),
        ("reduce_scatter_tensor", 4, 75),
        ("all_to_all_single", 4, 75),
        ("broadcast", 4, 100),
        ("all_reduce", 1, 0),
        ("all_gather_into_tensor", 1, 0),
        ("broadcast", 1, 0),
    ],
)
def test_bytes_of_dense_collectives(collective: str, ranks: int, sent: int) -> None:
    assert cost.sent_bytes(collective, 100, ranks) == sent


def test_share_of_uneven_splits() -> None:
    assert cost.share_leaving([2, 6], 0) == 0.75
    assert cost.share_leaving([0, 0], 0) == 0.0


@pytest.mark.parametrize("batch", [16, 32])
def test_traced_decisions_with_a_dynamic_batch(batch: int) -> None:
    x = leaf(batch, 64)
    torch._dynamo.mark_dynamic(x, 0)
    traced = trace(lambda x: gather(exchange(x.relu()).sin()), x)
    assert {(item.codec, item.slots) for item in traced.decisions} == {("mask", 4)}
    assert [item.dense_bytes for item in traced.decisions] == [batch * 192, batch * 768, batch * 768, batch * 192]


def test_quantised_only_if_embedding() -> None:
    table = torch.nn.Embedding(8, 64)
    assert trace(lambda index: exchange(table(index)), ids(16), embedding_codec="int4").codecs == ["quantize", "quantize"]
    assert trace(lambda index: exchange(table(index).relu()), ids(16), embedding_codec="int4").codecs == ["mask", "mask"]
