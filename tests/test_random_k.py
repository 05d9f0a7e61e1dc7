"""Random-k: the elements that all ranks draw, and what each rank sends of them and keeps."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from dct_compile.schemes.random_k import RandomK, draw
from tests.side_by_side import SideBySide, decide_shapes

SHAPES = {"first": (30, 20), "bias": (20,), "second": (7, 50)}
SIZES = [(600, 60), (350, 35)]


@pytest.mark.parametrize(("numel", "count"), [(1, 1), (5, 5), (10, 3), (1000, 10), (1001, 1000), (4099, 41)])
def test_one_element_of_every_stretch_is_drawn(numel: int, count: int) -> None:
    for step in range(50):
        drawn = draw(torch.tensor(step), [(numel, count)]).tolist()
        bounds = list(pairwise(number * numel // count for number in range(count + 1)))
        assert len(drawn) == count
        assert all(start <= index < end for index, (start, end) in zip(drawn, bounds, strict=True))
        assert len(set(drawn)) == count


def test_every_element_is_drawn_about_as_often() -> None:
    numel, count, steps = 1003, 100, 4000
    times = torch.zeros(numel)
    for step in range(steps):
        times[draw(torch.tensor(step), [(numel, count)])] += 1
    expected = torch.cat([torch.full((end - start,), steps / (end - start)) for start, end in _bounds(numel, count)])
    # The square of the deviation over its variance is 1 on average.
    length = steps / expected
    deviation = (times - expected) ** 2 / (expected * (1 - 1 / length))
    assert times.min() > 0.7 * steps / 11
    assert times.max() < 1.3 * steps / 10
    assert 0.9 < deviation.mean() < 1.1


def _bounds(numel: int, count: int) -> list[tuple[int, int]]:
    return list(pairwise(number * numel // count for number in range(count + 1)))


def test_draws_of_different_steps_and_stretches_are_independent() -> None:
    numel, count, steps = 10000, 100, 400
    places = torch.stack([draw(torch.tensor(step), [(numel, count)]) for step in range(steps)]) % 100
    for shifted, name in ((places.roll(1, 0), "step"), (places.roll(1, 1), "stretch"), (places.roll((1, 1), (0, 1)), "both")):
        same = (places == shifted).double().mean().item()
        assert 0.008 < same < 0.012, f"the next {name} draws the same place in {same:.1%} of cases, not in 1%"
        correlation = torch.corrcoef(torch.stack([places.flatten().double(), shifted.flatten().double()]))[0, 1].item()
        assert abs(correlation) < 0.02


@pytest.mark.parametrize("count", [1, 3, 2**10 + 1])
def test_large_numbers_do_not_overflow(count: int) -> None:
    numel, steps = 2**31, (0, 1, 2**20, 2**31 - 1)
    for step in steps:
        drawn = draw(torch.tensor(step), [(numel, count)]).tolist()
        assert all(start <= index < end for index, (start, end) in zip(drawn, _bounds(numel, count), strict=True))
    assert len({draw(torch.tensor(step), [(numel, count)]).tolist()[-1] for step in steps}) == len(steps)


def test_products_of_the_largest_buffer_stay_below_2_63() -> None:
    """The same arithmetic in Python's unbounded integers, for the last stretch of a buffer that is drawn nearly whole."""
    numel = count = step = 2**31
    assert count * numel < 2**63
    assert step * 0x1E3779B1 + count * 0x05EBCA77 < 2**63
    assert 0x7FFFFFFF * max(0x2C1B3C6D, 0x297A2D39, 0x1B56C4E9) < 2**63


def test_a_parameter_draws_alike_in_every_bucket() -> None:
    step = torch.tensor(7)
    alone = [draw(step, [size]) for size in ((600, 60), (350, 35), (41, 1))]
    together = draw(step, [(600, 60), (350, 35), (41, 1)])
    assert torch.equal(together, torch.cat([alone[0], alone[1] + 600, alone[2] + 950]))
    assert torch.equal(draw(step, [(350, 35), (600, 60)]), torch.cat([alone[1], alone[0] + 350]))


def test_what_is_sent_and_what_is_kept_make_up_the_sum_exactly() -> None:
    side = SideBySide(SHAPES, ranks=3, gradient_scheme="random_k", dp_density=0.1, min_numel=100)
    assert isinstance(side.offer, RandomK)
    drawn = []
    for step in range(5):
        grads, before = side.gradients(step), side.residuals()
        results = side.step(grads)
        index = draw(torch.tensor(step), SIZES)
        mean = torch.zeros(950)
        sent = []
        for grad, old, new in zip(grads, before, side.residuals(), strict=True):
            total = side.compressed(grad) + old
            sent.append(total - new)
            assert torch.equal(sent[-1] + new, total)
            assert sent[-1].nonzero().flatten().tolist() == index.tolist()
            assert torch.equal(sent[-1][index], total[index])
        mean[index] = torch.stack(sent).sum(0)[index] / 3
        assert all(torch.equal(side.compressed(result), mean) for result in results)
        drawn.append(tuple(index.tolist()))
    assert len(set(drawn)) == 5
    assert [state.tensors["draws"].tolist() for state in side.states] == [[5, 5]] * 3


def test_offer() -> None:
    decision = decide_shapes(SHAPES, ranks=4, gradient_scheme="random_k", dp_density=0.1)
    assert (decision.scheme, decision.reason) == ("random_k", "random_k, density 0.1; dense: bias")
    assert decision.wire_bytes == int(1.5 * 4 * 95) + int(1.5 * 4 * 20)
    assert decision.digest == "random_k: 95 of 950"
    assert decision.offer.state.sent == (60, 35)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dp_density": 1}, "dp_density=1 keeps everything"),
        ({"dp_density": 0.1, "exempt": ["*"], "min_numel": 0}, "exempt by pattern '*'"),
        ({"dp_density": 0.1, "min_numel": 1000}, "fewer than min_numel=1000 elements"),
        ({"dp_density": 0.1, "unused": True}, "random_k cannot leave out a parameter for one step, as find_unused_parameters asks"),
        ({"dp_density": 0.6, "dtype": torch.bfloat16}, "random_k with 2 ranks would send 2320 bytes, dense sends 1940"),
    ],
)
def test_left_dense(options: dict[str, Any], reason: str) -> None:
    decision = decide_shapes(SHAPES, gradient_scheme="random_k", **options)
    assert (decision.scheme, decision.reason) == ("dense", reason)


def test_steps_that_a_rank_has_counted_on_its_own_do_not_change_the_draw() -> None:
    """The counters that "gather" hands over may differ between ranks: they start anew, and no draw depends on them."""
    side = SideBySide(SHAPES, gradient_scheme="random_k", dp_density=0.1, min_numel=100)
    grads = side.gradients(0)
    for rank, state in enumerate(side.states):
        for member in range(2):
            state.write(member, {"residual": state.entry(member)["residual"].clone(), "counters": torch.tensor([5 + rank, 9, 0, 0])})
        assert not state.tensors["counters"].any()
        state.tensors["counters"][:, 0] = 5 + rank
    results = side.step(grads)
    index = draw(torch.tensor(0), SIZES)
    wanted = torch.stack([side.compressed(grad)[index] for grad in grads]).mean(0)
    for result in results:
        torch.testing.assert_close(side.compressed(result)[index], wanted)
    assert [state.tensors["counters"].tolist() for state in side.states] == [[[6, 0, 0, 0, 0]] * 2, [[7, 0, 0, 0, 0]] * 2]
