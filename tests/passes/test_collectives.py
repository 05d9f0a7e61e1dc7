"""The table of collectives, and operators that are not in it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx

from dct_compile.exchange import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL
from dct_compile.passes.collectives import TABLE, collective_of
from dct_compile.passes.sites import GraphContext, find_sites
from tests.hand_made_sites import decide, make_site
from tests.small_models import world
from tests.tracing import fake_group, trace

c10d = torch.ops._c10d_functional
REDUCE_SCATTER = "reduce_scatter_tensor"


def node_of(target: object, *args: object) -> fx.Node:
    return fx.Graph().call_function(target, args)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overload", "name", "sums", "carrier", "backward"),
    [
        (c10d.all_reduce.default, ALL_REDUCE, True, ALL_GATHER, ALL_REDUCE),
        (c10d.all_gather_into_tensor.default, ALL_GATHER, False, ALL_GATHER, REDUCE_SCATTER),
        (c10d.reduce_scatter_tensor.default, REDUCE_SCATTER, True, ALL_TO_ALL, ALL_GATHER),
        (c10d.all_to_all_single.default, ALL_TO_ALL, False, ALL_TO_ALL, ALL_TO_ALL),
    ],
)
def test_rows_of_the_table(overload: object, name: str, sums: bool, carrier: str, backward: str) -> None:
    row = TABLE[overload]
    assert collective_of(node_of(overload)) is row
    assert (row.name, row.sums, row.carrier, row.backward) == (name, sums, carrier, backward)


def test_the_backward_of_a_backward_is_the_forward() -> None:
    by_name = {row.name: row for row in TABLE.values()}
    for row in TABLE.values():
        assert by_name[row.backward].backward == row.name


@pytest.mark.parametrize("name", ["all_reduce_coalesced", "all_gather_into_tensor_out", "broadcast", "all_reduce_"])
def test_a_collective_without_a_row_has_no_carrier(name: str) -> None:
    found = collective_of(node_of(getattr(c10d, name).default))
    assert found is not None
    assert (found.name, found.carrier) == (name, "")


@pytest.mark.parametrize("target", [c10d.wait_tensor.default, torch.ops.aten.add.Tensor, torch.add, "relu"])
def test_what_starts_no_collective(target: object) -> None:
    node = fx.Graph().call_method(target) if isinstance(target, str) else node_of(target)
    assert collective_of(node) is None


@pytest.fixture
def newer_torch() -> Iterator[None]:
    """Adds operators that a newer torch could have: a collective without a group, and a wait for several tensors."""
    library = torch.library.Library("_c10d_functional", "FRAGMENT")
    library.define("shuffle_rows(Tensor x) -> Tensor")
    library.define("wait_tensors_of(Tensor[] started) -> Tensor[]")
    library.impl("shuffle_rows", lambda x: x.clone(), "CompositeExplicitAutograd")
    yield
    del library


@pytest.mark.usefixtures("newer_torch")
def test_an_unknown_operator_is_a_site_of_its_own_that_stays_dense() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(16, 64, device="meta")
    node = graph.call_function(c10d.shuffle_rows.default, (x,))
    waited = graph.call_function(c10d.wait_tensors_of.default, ([node],))
    graph.output((waited,))
    with fake_group(4):
        (site,) = find_sites(graph, GraphContext(training=False))
        assert (site.collective.name, site.group_name, site.group_size) == ("shuffle_rows", "unknown", 4)
        assert decide(site).reason == "shuffle_rows is not compressed"


@pytest.mark.usefixtures("newer_torch")
def test_a_model_with_an_unknown_operator_compiles_and_says_why_it_is_dense() -> None:
    traced = trace(lambda x: c10d.shuffle_rows(x + 1) * 2, torch.randn(16, 64))
    assert traced.reasons == ["shuffle_rows is not compressed"]
    assert str(traced.after) == str(traced.before)


def test_coalesced_collectives_stay_dense_with_a_reason() -> None:
    def coalesced(a: Tensor, b: Tensor) -> Tensor:
        first, second = c10d.all_reduce_coalesced([a + 1, b + 1], "sum", world().group_name)
        return c10d.wait_tensor(first) + c10d.wait_tensor(second)

    traced = trace(coalesced, torch.ones(4, 8), torch.ones(4, 8))
    assert traced.reasons == ["all_reduce_coalesced is not compressed"]
    assert traced.decisions[0].dense_bytes == 2 * 4 * 8 * 4 * 3 // 2, "both inputs, around a ring of 4 ranks twice"


def test_the_decision_for_no_rows_is_that_for_many() -> None:
    empty, full = decide(make_site(shape=(0, 64))), decide(make_site(shape=(4096, 64)))
    assert empty.digest == full.digest == "row_threshold: 4 of 64, bfloat16 values, exact"
    assert (empty.dense_bytes, empty.wire_bytes) == (0, 0)
