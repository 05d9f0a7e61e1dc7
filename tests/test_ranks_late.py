"""Gradients that arrive one step later: each is, value by value, the mean that the step before would have had."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dct_compile
from tests.rank_pool import Ranks
from tests.ranks import digest
from tests.ranks_ddp import SMALL_BUCKETS, Net, Options, batch, ddp_of, loss_of

pytestmark = pytest.mark.distributed
DENSITY = {"dp_density": 0.05}
SCHEMES = ("gather", "owner", "powersgd", "random_k")
Gradients = dict[str, Tensor]


def gradients_of(model: nn.Module) -> Gradients:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def beside_now(rank: int, world_size: int, inside: bool, options: Options, settings: dict[str, Any]) -> list[str]:
    """Trains a model whose gradients arrive late, and one that always has its parameters and whose gradients arrive now.

    Returns the digests of the parameters. Small buckets are rebuilt after the first step.
    """
    torch._dynamo.config.optimize_ddp = False  # it wants buckets of 1 MB
    late, now = Net(), Net()
    (module, trained), (shadow, other) = (
        ddp_of(net, {**options, "arrival": arrival}, inside, bucket_cap_mb=SMALL_BUCKETS, **settings)
        for net, arrival in ((late, "late"), (now, "now"))
    )
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.2), torch.optim.SGD(shadow.parameters(), lr=0.0)]
    before: Gradients = {}
    digests = []
    for step in range(6):
        now.load_state_dict(late.state_dict())
        loss_of(trained(batch(rank, step))).backward()
        loss_of(other(batch(rank, step))).backward()
        found, present = gradients_of(late), gradients_of(now)
        compressed = dct_compile.state_dict(late)
        assert compressed.keys() == dct_compile.state_dict(now).keys()
        assert len(compressed) >= 2
        for name, gradient in found.items():
            expected = present[name] if name not in compressed else before.get(name, torch.zeros_like(gradient))
            # What stays dense is added up by an all_reduce here and behind the payload there: with three ranks in another order.
            assert torch.equal(gradient, expected) or (name not in compressed and gradient.allclose(expected)), f"step {step}: {name}"
        for name, entry in dct_compile.state_dict(now).items():
            assert torch.equal(entry["residual"], compressed[name]["residual"]), f"step {step}: {name}"
            assert torch.equal(compressed[name]["late"], present[name].flatten()), name
        before = present
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        digests.append(digest(module.parameters()))
    return digests


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gradient_is_the_mean_of_the_step_before(ranks2: Ranks, scheme: str, inside: bool) -> None:
    first, second = ranks2(beside_now, inside, {**DENSITY, "gradient_scheme": scheme}, {})
    assert first == second
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_on_three_ranks(ranks3: Ranks, scheme: str) -> None:
    first, second, third = ranks3(beside_now, False, {**DENSITY, "gradient_scheme": scheme}, {})
    assert first == second == third


@pytest.mark.parametrize("settings", [{"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
def test_under_settings_of_ddp(ranks2: Ranks, settings: dict[str, Any]) -> None:
    first, second = ranks2(beside_now, True, {**DENSITY, "gradient_scheme": "gather"}, settings)
    assert first == second
