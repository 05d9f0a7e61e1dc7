"""Trainings whose gradients arrive one step later: resumed, drained, scaled, and skipped."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dct_compile
from tests.rank_pool import Ranks
from tests.ranks import digest
from tests.ranks_balance import wrap
from tests.ranks_ddp import Net, batch, loss_of

pytestmark = pytest.mark.distributed
SCHEMES = ("gather", "owner", "powersgd", "random_k")
LATE: dict[str, Any] = {"dp_density": 0.05, "arrival": "late"}
ALL = {**LATE, "min_numel": 0}
"""Nothing stays dense, so that no collective in the backward waits for the other rank."""


class Images(nn.Module):
    """A convolution whose gradient lies in memory in another order than its dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c = nn.Conv2d(4, 16, 2).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x.view(-1, 4, 2, 2).to(memory_format=torch.channels_last))


class Training:
    """A model in training under AdamW."""

    def __init__(self, rank: int, options: dict[str, Any], make: type[nn.Module] = Net, **settings: Any) -> None:
        self.rank, self.module = rank, wrap(make(), options, **settings)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.01)

    def backward(self, step: int, scale: float = 1.0) -> None:
        (scale * loss_of(self.module(batch(self.rank, step)))).backward()

    def steps(self, steps: Sequence[int]) -> list[str]:
        digests = []
        for step in steps:
            self.backward(step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            digests.append(digest(self.module.parameters()))
        return digests

    def gradients(self) -> dict[str, Tensor]:
        return {name: item.grad for name, item in self.module.module.named_parameters() if item.grad is not None}

    def save(self) -> Any:
        return [item.state_dict() for item in (self.module, self.optimizer)], dct_compile.state_dict(self.module)

    def load(self, saved: Any) -> "Training":
        for item, state in zip((self.module, self.optimizer), copy.deepcopy(saved[0]), strict=True):
            item.load_state_dict(state)
        dct_compile.load_state_dict(self.module, saved[1])
        return self


def by_hand(rank: int, world_size: int) -> list[tuple[list[str], list[str]]]:
    """Trains with late gradients, and with gradients that a loop delays by a step."""
    found = []
    for scheme in SCHEMES:
        options = {**LATE, "gradient_scheme": scheme}
        late = Training(rank, options).steps(range(5))
        now, delayed, digests = Training(rank, {**options, "arrival": "now"}), {}, []
        for step in range(5):
            now.backward(step)
            for name in dct_compile.state_dict(now.module):
                gradient = now.gradients()[name]
                present = gradient.clone()
                gradient.copy_(delayed.get(name, torch.zeros_like(gradient)))
                delayed[name] = present
            now.optimizer.step()
            now.optimizer.zero_grad()
            digests.append(digest(now.module.parameters()))
        found.append((late, digests))
    return found


def test_it_is_the_training_with_gradients_of_the_step_before(ranks2: Ranks) -> None:
    for late, delayed in ranks2(by_hand)[0]:
        assert late == delayed


def resumed(rank: int, world_size: int) -> list[list[list[str]]]:
    """Trains on without a break, from the same place once more, and from there in another model that has not run yet."""
    found = []
    for scheme in SCHEMES:
        options = {**LATE, "gradient_scheme": scheme}
        training = Training(rank, options, bucket_cap_mb=0.004)
        training.steps(range(3))
        saved = copy.deepcopy(training.save())
        assert all(entry["late"].any() for entry in saved[1].values())
        expected = training.steps(range(3, 6))
        again = training.load(saved).steps(range(3, 6))
        found.append([expected, again, Training(rank, options).load(saved).steps(range(3, 6))])
    return found


def test_a_resumed_training_goes_on_bit_for_bit(ranks2: Ranks) -> None:
    for expected, again, other in ranks2(resumed)[0]:
        assert expected == again == other


def drained(rank: int, world_size: int, make: type[nn.Module], scheme: str) -> bool:
    """Returns whether every rank got back what was under way, and whether nothing arrives at the next step."""
    training = Training(rank, {**LATE, "gradient_scheme": scheme}, make)
    training.steps(range(3))
    before = dct_compile.state_dict(training.module)
    dct_compile.drain(training.module)
    after = dct_compile.state_dict(training.module)
    for name, entry in after.items():
        assert before[name]["late"].any()
        assert not entry["late"].any()
        assert torch.equal(entry["residual"], before[name]["residual"] + before[name]["late"])
        assert torch.equal(entry["counters"], before[name]["counters"])
    training.backward(3)
    gradients = training.gradients()
    return not any(gradients[name].any() for name in after) and dct_compile.state_dict(training.module)[name]["late"].any().item()


@pytest.mark.parametrize(("make", "scheme"), [(Net, "gather"), (Net, "owner"), (Net, "powersgd"), (Images, "gather"), (Images, "random_k")])
def test_a_drain_hands_back_what_is_under_way(ranks2: Ranks, make: type[nn.Module], scheme: str) -> None:
    assert ranks2(drained, make, scheme) == [True, True]


def changed_to_now(rank: int, world_size: int) -> bool:
    """The same parameters are wrapped anew, without option ``arrival``."""
    net = Net()
    training = Training(rank, LATE, lambda: net)  # type: ignore[arg-type]
    training.steps(range(3))
    before = dct_compile.state_dict(net)
    module = wrap(net, {"dp_density": 0.05})
    (0 * loss_of(module(batch(rank, 3)))).backward()
    after = dct_compile.state_dict(net)
    for name, entry in before.items():
        sent = entry["residual"] + entry["late"] - after[name]["residual"]
        dist.all_reduce(sent)
        assert "late" not in after[name]
        torch.testing.assert_close(net.get_parameter(name).grad.flatten() * world_size, sent, rtol=0, atol=1e-6)
    return all(entry["late"].any() for entry in before.values())


def test_another_wrapper_without_it_keeps_what_was_under_way(ranks2: Ranks) -> None:
    assert ranks2(changed_to_now) == [True, True]


def scaled(rank: int, world_size: int, scales: list[float]) -> list[str]:
    """Trains with a scale of the loss that is set by hand."""
    training = Training(rank, LATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=scales[0])
    digests = []
    for step, scale in enumerate(scales):
        scaler.scale(loss_of(training.module(batch(rank, step)))).backward()
        scaler.step(training.optimizer)
        scaler.update(scale)
        training.optimizer.zero_grad()
        digests.append(digest(training.module.parameters()))
    return digests


def test_a_late_mean_follows_the_scale_of_the_loss(ranks2: Ranks) -> None:
    """Powers of two change no value."""
    assert ranks2(scaled, [1.0] * 6) == ranks2(scaled, [2.0**8, 2.0**8, 2.0**12, 2.0**4, 2.0**4, 1.0])


def not_finite(rank: int, world_size: int, scheme: str) -> tuple[list[bool], float, bool]:
    """Returns whether the gradients of each step were finite, the scale in the end, and whether the state is finite."""
    training = Training(rank, {**ALL, "gradient_scheme": scheme})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    finite = []
    for step in range(6):
        bad = float("inf") if (rank, step) == (1, 2) else 1.0
        scaler.scale(bad * loss_of(training.module(batch(rank, step)))).backward()
        finite.append(all(bool(gradient.isfinite().all()) for gradient in training.gradients().values()))
        scaler.step(training.optimizer)
        scaler.update()
        training.optimizer.zero_grad()
    state = dct_compile.state_dict(training.module)
    return finite, scaler.get_scale(), all(bool(value.isfinite().all()) for entry in state.values() for value in _floats(entry))


def _floats(entry: dict[str, Any]) -> list[Tensor]:
    return [entry["residual"], entry["late"]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_finite_is_skipped_once(ranks2: Ranks, scheme: str) -> None:
    """It shows a step later, and at once in the vectors that "powersgd" leaves dense."""
    skipped = 2 if scheme == "powersgd" else 3
    expected = [step != skipped for step in range(6)], 2.0**7, True
    assert ranks2(not_finite, scheme) == [expected, expected]


def zeroed(rank: int, world_size: int) -> list[list[str]]:
    """Discards gradients, the first ones and later ones: ``zero_grad`` leaves none, or zeros."""
    found = []
    for to_none in (True, False):
        training, digests = Training(rank, LATE), []
        for step in range(7):
            training.backward(step)
            if step not in (0, 4):
                training.optimizer.step()
            training.optimizer.zero_grad(set_to_none=to_none)
            digests.append(digest(training.module.parameters()))
        found.append(digests)
    return found


def test_discarded_gradients_leave_what_had_arrived(ranks2: Ranks) -> None:
    for to_none, to_zero in ranks2(zeroed):
        assert to_none == to_zero
        assert len(set(to_none)) == 6  # step 0 and step 4 apply nothing
