"""Rewriting of activation and embedding exchanges: the graph, and what it computes on several ranks."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dct_compile.passes.graph_utils import WAIT, argument
from tests.lockstep import make_inputs, run_both, trace_all
from tests.small_models import Layers, SumOfParts, all_reduce, c10d, exchange, gather, ids, leaf, reduce_scatter, world
from tests.torch_versions import needs_torch
from tests.tracing import communication, dct, nodes_of, outputs, trace

A2A, AG = c10d.all_to_all_single.default, c10d.all_gather_into_tensor.default
RS, AR = c10d.reduce_scatter_tensor.default, c10d.all_reduce.default
PACK, UNPACK = dct.pack_rows.default, dct.unpack_rows.default
GATHER, SCATTER = dct.gather_rows.default, dct.scatter_rows.default
MASKED = {PACK: 1, UNPACK: 1, GATHER: 1, SCATTER: 1, WAIT: 2}

COLLECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "all_to_all": exchange,
    "all_gather": gather,
    "all_gather of columns": lambda x: gather(x, 1),
    "reduce_scatter": reduce_scatter,
    "all_reduce": all_reduce,
}
REWRITTEN: dict[str, tuple[Mapping[Any, int], Mapping[Any, int]]] = {
    "all_to_all": ({A2A: 2, WAIT: 2}, {A2A: 2, **MASKED}),
    "all_gather": ({AG: 1, RS: 1, WAIT: 2}, {AG: 1, A2A: 1, **MASKED}),
    "all_gather of columns": ({AG: 1, RS: 1, WAIT: 2}, {AG: 1, A2A: 1, **MASKED}),
    "reduce_scatter": ({RS: 1, AG: 1, WAIT: 2}, {A2A: 2, **MASKED}),
    "all_reduce": ({AR: 2, WAIT: 2}, {AG: 1, A2A: 1, **MASKED}),
}
needs_columns = needs_torch("2.13", "Dynamo cannot trace all_gather_tensor_autograd with gather_dim=1")
every_collective = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_columns) if name.endswith("columns") else name for name in COLLECTIVES]
)


def keep_largest(x: Tensor, count: int) -> Tensor:
    """The ``count`` largest magnitudes of each row, zeros elsewhere."""
    kept = x.abs().topk(count, dim=-1).indices
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


@every_collective
def test_forward_and_backward_are_rewritten(name: str) -> None:
    traced = trace(lambda x: COLLECTIVES[name](x.relu()).sin(), leaf(16, 64))
    before, after = REWRITTEN[name]
    assert communication(traced.before) == before
    assert communication(traced.after) == after
    traced.after.lint()
    for node in [*nodes_of(traced.after, A2A), *nodes_of(traced.after, AG)]:
        assert node.args[0].meta["val"].dtype in (torch.uint8, torch.bfloat16)


@every_collective
def test_evaluation_has_a_forward_only(name: str) -> None:
    traced = trace(lambda x: COLLECTIVES[name](x.relu()).sin(), torch.randn(16, 64))
    assert communication(traced.after) == {
        PACK: 1,
        AG if name.startswith("all_gather") or name == "all_reduce" else A2A: 1,
        WAIT: 1,
        UNPACK: 1,
    }


LEFT_ALONE: dict[str, tuple[Callable[[Tensor], Any], Tensor, dict[str, Any]]] = {
    "wrong dtype": (exchange, torch.zeros(16, 64, dtype=torch.float64), {}),
    "no rows": (exchange, torch.zeros(1024), {}),
    "keep everything": (exchange, torch.zeros(16, 64), {"mp_density": 1}),
    "too short": (exchange, torch.zeros(16, 8), {}),
    "other reduction": (lambda x: all_reduce(x, "max"), torch.zeros(16, 64), {}),
    "extra user": (
        lambda x: (started := c10d.all_reduce(x, "sum", world().group_name), c10d.wait_tensor(started)),
        torch.zeros(16, 64),
        {},
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_the_plan_leaves_dense_is_not_touched(name: str) -> None:
    function, x, options = LEFT_ALONE[name]
    traced = trace(lambda x: function(x + 1), x, **options)
    assert traced.schemes == ["dense"]
    assert str(traced.after) == str(traced.before)


def test_dense_embeddings_beside_masked_activations() -> None:
    table = nn.Embedding(8, 64)
    traced = trace(lambda index, x: exchange(table(index)) * exchange(x.relu()), ids(16), leaf(16, 64), embedding_codec="dense")
    assert communication(traced.after) == {**MASKED, A2A: 4, WAIT: 4}


@needs_columns
def test_chain_of_exchanges() -> None:
    layers = Layers()

    def chain(x: Tensor) -> Tensor:
        hidden = exchange(torch.relu(layers.bottom(x)))
        return gather(torch.relu(exchange(torch.tanh(hidden))), 1)

    traced = trace(chain, leaf(16, 64))
    assert traced.schemes == ["row_threshold"] * 6
    assert communication(traced.after) == {A2A: 5, AG: 1, WAIT: 6, PACK: 3, UNPACK: 3, GATHER: 3, SCATTER: 3}
    traced.after.lint()


def test_result_waited_for_twice() -> None:
    def twice(x: Tensor) -> Tensor:
        started = c10d.all_reduce(x + 1, "sum", world().group_name)
        return c10d.wait_tensor(started).sin() + c10d.wait_tensor(started).cos()

    traced = trace(twice, torch.randn(16, 64))
    assert communication(traced.after) == {PACK: 1, AG: 1, WAIT: 1, UNPACK: 1}


@every_collective
def test_equal_where_everything_fits(name: str) -> None:
    """relu leaves about half of a row; density .7 has room for it."""
    ranks = trace_all(lambda x: COLLECTIVES[name](x.relu()).sin(), leaf(16, 64), mp_density=0.7, mp_value_dtype="float32")
    for dense, compressed in zip(*run_both(ranks), strict=True):
        torch.testing.assert_close(compressed, dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_row_keeps_its_largest_and_the_gradient_its_mask(ranks: int) -> None:
    everyone = trace_all(lambda x: exchange(x), leaf(16, 64), ranks=ranks, mp_value_dtype="float32")
    for rank, (dense, compressed) in enumerate(zip(*run_both(everyone), strict=True)):
        sent = make_inputs(everyone[rank], rank)[0]
        torch.testing.assert_close(compressed[0], keep_largest(dense[0], 4), rtol=0, atol=0)
        torch.testing.assert_close(compressed[1], dense[1] * (keep_largest(sent, 4) != 0), rtol=0, atol=0)


def test_gather_adds_up_the_gradients_at_each_owners_mask() -> None:
    everyone = trace_all(lambda x: gather(x), leaf(16, 64), ranks=4, mp_value_dtype="float32")
    for rank, (dense, compressed) in enumerate(zip(*run_both(everyone), strict=True)):
        sent = make_inputs(everyone[rank], rank)[0]
        torch.testing.assert_close(compressed[0], keep_largest(dense[0], 4), rtol=0, atol=0)
        torch.testing.assert_close(compressed[1], dense[1] * (keep_largest(sent, 4) != 0))


def test_reductions_add_up_masked_rows() -> None:
    everyone = trace_all(lambda x: reduce_scatter(x), leaf(16, 64), ranks=4, mp_value_dtype="float32")
    sent = [make_inputs(item, rank)[0] for rank, item in enumerate(everyone)]
    total = torch.stack([keep_largest(x, 4) for x in sent]).sum(0)
    for rank, (dense, compressed) in enumerate(zip(*run_both(everyone), strict=True)):
        torch.testing.assert_close(compressed[0], total[4 * rank : 4 * rank + 4])
        torch.testing.assert_close(compressed[1], dense[1] * (keep_largest(sent[rank], 4) != 0), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("collective", "op"),
    [
        (all_reduce, "sum"),
        (all_reduce, "avg"),
        (reduce_scatter, "sum"),
        pytest.param(reduce_scatter, "avg", marks=needs_torch("2.13", "Dynamo cannot trace reduce_scatter_tensor_autograd with avg")),
    ],
)
def test_sums_and_averages(collective: Callable[[Tensor, str], Tensor], op: str) -> None:
    everyone = trace_all(lambda x: collective(x * 1, op), torch.randn(16, 64), ranks=4, mp_value_dtype="float32")
    total = torch.stack([keep_largest(make_inputs(item, rank)[0], 4) for rank, item in enumerate(everyone)]).sum(0)
    wanted = total / 4 if op == "avg" else total
    for rank, (_, compressed) in enumerate(zip(*run_both(everyone), strict=True)):
        torch.testing.assert_close(compressed[0], wanted if collective is all_reduce else wanted[4 * rank : 4 * rank + 4])


def test_row_parallel_layer_masks_the_gradient_where_it_is() -> None:
    def part(x: Tensor) -> tuple[Any, Tensor]:
        hidden = x.sin()
        return SumOfParts.apply(hidden), x * 2  # type: ignore[no-untyped-call]

    everyone = trace_all(part, leaf(16, 64), mp_value_dtype="float32")
    assert everyone[0].schemes == ["row_threshold"]
    assert communication(everyone[0].after) == {PACK: 1, AG: 1, WAIT: 1, UNPACK: 1, GATHER: 1, SCATTER: 1}
    for rank, (dense, compressed) in enumerate(zip(*run_both(everyone), strict=True)):
        x, *tangents = make_inputs(everyone[rank], rank)
        mask = keep_largest(x.sin(), 4) != 0
        torch.testing.assert_close(compressed[2], tangents[0] * mask * x.cos() + tangents[1] * 2)
        torch.testing.assert_close(compressed[1], dense[1], rtol=0, atol=0)


def test_uneven_splits_are_kept() -> None:
    class Uneven(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.received, self.sent = ([6, 2], [6, 10]) if rank == 0 else ([10, 3], [2, 3])

        def forward(self, x: Tensor) -> Any:
            return c10d.wait_tensor(c10d.all_to_all_single(x[: sum(self.sent)].sin(), self.received, self.sent, world().group_name))

    everyone = [trace(Uneven(rank), leaf(16, 64), ranks=2, rank=rank, mp_value_dtype="float32") for rank in range(2)]
    for rank, item in enumerate(everyone):
        forward, backward = nodes_of(item.after, A2A)
        wanted = [[6, 2], [6, 10]] if rank == 0 else [[10, 3], [2, 3]]
        assert [argument(forward, "output_split_sizes"), argument(forward, "input_split_sizes")] == wanted
        assert [argument(backward, "output_split_sizes"), argument(backward, "input_split_sizes")] == wanted[::-1]
    for dense, compressed in zip(*run_both(everyone), strict=True):
        torch.testing.assert_close(compressed[0], keep_largest(dense[0], 4), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(dtype: torch.dtype) -> None:
    everyone = trace_all(lambda x: gather(x.relu()), leaf(16, 64, dtype=dtype), mp_density=0.65, mp_value_dtype=str(dtype)[6:])
    for dense, compressed in zip(*run_both(everyone), strict=True):
        assert [item.dtype for item in compressed] == [dtype] * 2
        torch.testing.assert_close(compressed, dense)


def test_dimensions_before_the_last_are_rows_too() -> None:
    everyone = trace_all(lambda x: exchange(x), leaf(8, 3, 64), mp_value_dtype="float32")
    for dense, compressed in zip(*run_both(everyone), strict=True):
        torch.testing.assert_close(compressed[0], keep_largest(dense[0], 4), rtol=0, atol=0)


def test_new_nodes_carry_values_and_the_users_line() -> None:
    traced = trace(lambda x: gather(x.relu()), leaf(16, 64))
    for node in traced.after.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("dct", "_c10d_functional"):
            assert isinstance(node.meta["val"], Tensor)
            assert "small_models.py" in node.stack_trace


def test_backward_keeps_the_payload_not_the_activation() -> None:
    """[Gupta21]: the mask is all that the backward of an exchange needs."""
    layer = nn.Linear(64, 64)
    traced = trace(lambda x: exchange(layer(x)), torch.randn(16, 64))
    saved = [node.meta["val"] for node in outputs(traced.forward)[1:]]
    assert [(value.dtype, tuple(value.shape)) for value in saved if value.dtype == torch.uint8] == [(torch.uint8, (16, 12))] * 2
    dense = [node.target for node in outputs(traced.forward)[1:] if node.op != "placeholder" and node.meta["val"].dtype == torch.float32]
    assert dense == []
    assert communication(traced.forward) == {PACK: 1, A2A: 1, WAIT: 1, UNPACK: 1}
    assert communication(traced.backward) == {GATHER: 1, A2A: 1, WAIT: 1, SCATTER: 1}


@pytest.mark.parametrize("collective", [exchange, gather, reduce_scatter])
def test_dynamic_batch(collective: Callable[[Tensor], Tensor]) -> None:
    x = leaf(16, 64)
    torch._dynamo.mark_dynamic(x, 0)
    traced = trace(lambda x: collective(x.relu()), x)
    assert traced.schemes == ["row_threshold", "row_threshold"]
    assert not isinstance(nodes_of(traced.after, PACK)[0].meta["val"].shape[0], int)
    traced.after.lint()
