"""The link between real ranks: measured alike on all, recognised on one machine, given up together; and what is decided by it."""

import pytest

from dct_compile.link import ONE_MACHINE, Link
from tests.rank_pool import Ranks
from tests.ranks_links import agree, agree_on_one, agree_on_two, decide, explain, measure, measure_in_a_graph, recognise

pytestmark = pytest.mark.distributed


def test_all_ranks_measure_the_same(ranks3: Ranks) -> None:
    first, *others = ranks3(measure)
    assert others == [first, first]
    assert 1e5 < first["bytes_per_s"] < 1e12
    assert 1e-7 < first["latency_s"] < 1
    assert 1e7 < first["copy_bytes_per_s"] < 1e13
    assert 1e6 < first["inside_bytes_per_s"] < 1e12


def test_the_first_rank_speaks_for_all(ranks2: Ranks) -> None:
    assert {link.bytes_per_s for link in ranks2(agree, None)} <= {100.0, *(100.0 * factor for factor in (0.5, 2))}


def test_ranks_of_one_host_measure_nothing(ranks2: Ranks) -> None:
    assert ranks2(agree_on_one) == [ONE_MACHINE, ONE_MACHINE]


@pytest.mark.parametrize("absent", [0, 1])
def test_no_rank_has_a_link_where_one_comes_too_late(ranks2: Ranks, absent: int) -> None:
    assert ranks2(agree, absent) == [None, None]


def test_threads_may_ask_for_groups_in_another_order(ranks2: Ranks) -> None:
    assert ranks2(agree_on_two) == [[True, True]] * 2


def test_one_machine_is_recognised(ranks2: Ranks) -> None:
    expected = [True, True, False, ONE_MACHINE, Link(5.0).on("cpu"), None]
    assert ranks2(recognise) == [expected, expected]


@pytest.mark.parametrize("outside", [True, False], ids=["ddp", "data_parallel"])
def test_on_one_machine_gradients_stay_dense(ranks2: Ranks, outside: bool) -> None:
    found = ranks2(decide, {}, 1, outside)
    for sites, hooked, _ in found:
        assert {decision for decision, _ in sites} == {"dense"}
        assert all(reason.startswith("all ranks are on one machine") for _, reason in sites)
        assert not hooked
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("outside", [True, False], ids=["ddp", "data_parallel"])
def test_on_a_slow_link_gradients_are_compressed(ranks2: Ranks, outside: bool) -> None:
    for sites, hooked, _ in ranks2(decide, {"link": "10Mbit/s"}, 1, outside):
        assert "compressed" in {decision for decision, _ in sites}
        assert hooked == outside


@pytest.mark.parametrize("outside", [True, False], ids=["ddp", "data_parallel"])
def test_between_hosts_the_measured_link_decides(ranks2: Ranks, outside: bool) -> None:
    """The link is the loopback: the ranks decide alike, whatever it is."""
    (first, _, one), (second, _, other) = ranks2(decide, {}, 2, outside)
    assert first == second
    assert one == other
    assert all("one machine" not in reason for _, reason in first)


def test_a_compilation_measures_with_real_tensors(ranks2: Ranks) -> None:
    for real, decisions in ranks2(measure_in_a_graph):
        assert real
        assert decisions == ["compressed", "compressed"]


def test_a_rank_explains_alone_without_a_link(ranks2: Ranks) -> None:
    assert "compressed" in ranks2(explain)[0]
