"""The plan: every reason to leave a site dense, and what decisions may not depend on."""

from typing import Any

import pytest
import torch

from dct_compile.config import DCTConfig
from dct_compile.passes.plan import plan
from tests.hand_made_sites import decide, make_gradient, make_site
from tests.small_models import exchange, gather, ids, leaf
from tests.tracing import trace

FORWARD_REASONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a group of one rank sends nothing": ({"ranks": 1}, {}),
    "broadcast is not compressed": ({"collective": "broadcast"}, {}),
    "dtype int64 is not compressed (float32, bfloat16 and float16 are)": ({"dtype": torch.int64, "kind": "other"}, {}),
    "dtype float64 is not compressed (float32, bfloat16 and float16 are)": ({"dtype": torch.float64}, {}),
    "reduce operation 'max' is not compressed (sum and avg are)": ({"collective": "all_reduce", "op": "max"}, {}),
    "reduce operation 'min' is not compressed (sum and avg are)": ({"collective": "reduce_scatter_tensor", "op": "min"}, {}),
    "no forward collective has this one as its backward, so there is no mask to reuse": (
        {"kind": "activation_gradient"},
        {"activation_codec": "threshold"},
    ),
    "carries parameters, not activations": ({"kind": "other", "origin": "parameter"}, {}),
    "its input was computed outside of this graph, so an embedding exchange cannot be told from an activation": (
        {"origin": "foreign"},
        {"activation_codec": "threshold"},
    ),
    "a tensor of fewer than two dimensions has no rows": ({"shape": (64,)}, {}),
    "rows of 16385 elements are wider than 16384": ({"shape": (4, 16385)}, {}),
    "rows of 7 elements are few numbers each, such as statistics, and stay exact": ({"shape": (16, 7)}, {}),
    "rows of 16411 elements are wider than 16384": ({"shape": (4, 16411), "origin": "computed"}, {}),  # a prime: there are no equal blocks
    "activation_codec='dense'": ({}, {"activation_codec": "dense"}),
    "bfloat16 is not larger than bfloat16, or a sum of so many ranks would be": (
        {"dtype": torch.bfloat16},
        {"activation_codec": "bfloat16"},
    ),
    "embedding_codec='dense'": ({"kind": "embedding"}, {"embedding_codec": "dense"}),
    "int8 rows of 2 elements are not smaller than dense ones": ({"kind": "embedding", "shape": (16, 2), "dtype": torch.bfloat16}, {}),
    "int4 rows of 1 elements are not smaller than dense ones": (
        {"kind": "embedding", "shape": (16, 1), "dtype": torch.bfloat16},
        {"embedding_codec": "int4"},
    ),
    "mp_density=1 keeps everything": ({}, {"mp_density": 1}),
    "rows of 8 elements are too short for mp_density=0.05": ({"shape": (16, 8)}, {"activation_codec": "threshold"}),
    "a row would take 290 bytes, 256 when dense": ({}, {"mp_density": 0.9, "mp_value_dtype": "float32"}),
    "a row would take 12 bytes, 128 when dense": ({"dtype": torch.bfloat16, "collective": "all_reduce", "ranks": 22}, {}),
    "the gradient of its input could not be found, so it could not be masked": (
        {"collective": "all_reduce"},
        {"activation_codec": "threshold"},
    ),
}


@pytest.mark.parametrize("reason", FORWARD_REASONS)
def test_forward_left_dense(reason: str) -> None:
    changes, options = FORWARD_REASONS[reason]
    decision = decide(make_site(**changes), training="22" not in str(changes), **options)
    assert (decision.scheme, decision.reason) == ("dense", reason)
    assert decision.wire_bytes == decision.dense_bytes


def test_evaluation_is_left_dense_on_request_only() -> None:
    assert decide(make_site(), training=False, mp_eval=False).reason == "mp_eval=False leaves evaluation dense"
    assert decide(make_site(), training=False).scheme == "row_threshold"
    assert decide(make_site(), training=True, mp_eval=False).scheme == "row_threshold"


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


def test_dynamic_sequence_is_not_called_a_dynamic_width() -> None:
    x = leaf(16, 8, 64)
    torch._dynamo.mark_dynamic(x, 1)
    assert trace(lambda x: exchange(x.relu()), x).reasons[0] == "a size between the first and the last is dynamic"


def test_result_that_nothing_waits_for_is_left_dense() -> None:
    site = make_site()
    output = next(iter(site.node.graph.find_nodes(op="output")))
    output.args = ((),)
    for wait in list(site.node.users):
        site.node.graph.erase_node(wait)
    assert decide(site).reason == "nothing waits for its result"


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
    "gather with 64 ranks would send 77868 bytes, dense sends 32256": ({"ranks": 64}, {"dp_density": 0.09, "gradient_scheme": "gather"}),
    "owner with 4 ranks would send 27096 bytes, dense sends 24576": (
        {"ranks": 4},
        {"dp_density": 0.8, "dp_value_dtype": "float32", "gradient_scheme": "owner"},
    ),
}


@pytest.mark.parametrize("reason", GRADIENT_REASONS)
def test_gradient_left_dense(reason: str) -> None:
    changes, options = GRADIENT_REASONS[reason]
    decision = decide(make_gradient(4096, **changes), **options)
    assert (decision.scheme, decision.reason) == ("dense", reason)


def test_every_reason_of_a_bucket_is_given_once() -> None:
    decision = decide(make_gradient(64, 64, 4096), exempt=["p2"])
    assert decision.reason == "fewer than min_numel=128 elements; exempt by pattern 'p2'"


def test_layout_follows_the_options() -> None:
    options = {"dp_density": 0.001, "capacity_factor": 2.0, "dp_value_dtype": "float32"}
    decision = decide(make_gradient(10**6, ranks=2), **options)
    layout = decision.offer.codec.layout
    assert (layout.block, layout.capacity_fraction, layout.value_dtype) == (4096, 0.002, torch.float32)
    assert decide(make_gradient(4096, ranks=2), dp_density=0.5, capacity_factor=4.0).offer.codec.layout.capacity_fraction == 1.0


@pytest.mark.parametrize("shape", [(64,), (16, 64), (16, 2, 64)])
def test_decisions_do_not_depend_on_the_batch(shape: tuple[int, ...]) -> None:
    def signatures(rows: int) -> list[tuple[str, str]]:
        sites = [make_site(name, (rows, *shape[1:])) for name in ("all_to_all_single", "all_gather_into_tensor", "all_reduce")]
        sites.append(make_site(shape=(rows, *shape[1:]), kind="embedding", origin="embedding"))
        return [(item.exchange.key(), item.digest) for item in plan(sites, DCTConfig(), False)]

    assert signatures(4) == signatures(4096) == signatures(0)


def test_decisions_do_not_depend_on_the_rank() -> None:
    def signature(rank: int) -> tuple[str, str]:
        decision = decide(make_gradient(64, 4096, rank=rank))
        return decision.exchange.key(), decision.digest

    assert signature(0) == signature(3)
    assert signature(0)[0] == "all_reduce gradient float32 [64,4096] avg training"
    assert signature(0)[1] == (
        "owner: 1 parameters, 160 bytes in 4 chunks, blocks of 256, bfloat16 values; "
        "threshold exact for density 0.01, every 1000 steps, warm-up geometric, held"
    )


def test_signatures_tell_decisions_apart() -> None:
    sites = [
        make_site(),
        make_site(shape=(16, 128)),
        make_site(dtype=torch.bfloat16),
        make_site("all_gather_into_tensor"),
        make_site(kind="embedding"),
    ]
    decisions = [decide(site) for site in sites] + [decide(make_site(), mp_density=density) for density in (0.1, 1)]
    found = [(decision.exchange.key(), decision.digest) for decision in decisions]
    assert found[0] == ("all_to_all_single activation float32 [64] training", "row_threshold: 4 of 64, bfloat16 values, exact")
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
    assert [decision.scheme for decision in decisions] == ["dense", "row_threshold", "owner", "row_threshold", "dense"]
    assert [decision.compressed for decision in decisions] == [False, True, True, True, False]


@pytest.mark.parametrize("batch", [16, 32])
def test_traced_decisions_with_a_dynamic_batch(batch: int) -> None:
    x = leaf(batch, 64)
    torch._dynamo.mark_dynamic(x, 0)
    traced = trace(lambda x: gather(exchange(x.relu()).sin()), x)
    assert {(item.scheme, item.offer.capacity) for item in traced.decisions} == {("row_threshold", 4)}
    assert [item.dense_bytes for item in traced.decisions] == [batch * 192, batch * 768, batch * 768, batch * 192]


def test_quantised_only_if_embedding() -> None:
    table = torch.nn.Embedding(8, 64)
    assert trace(lambda index: exchange(table(index)), ids(16), embedding_codec="int4").schemes == ["quantized_rows", "quantized_rows"]
    assert trace(lambda index: exchange(table(index).relu()), ids(16), embedding_codec="int4").schemes == ["row_threshold", "row_threshold"]
