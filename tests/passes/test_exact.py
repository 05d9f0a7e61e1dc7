"""Rows that codecs would ruin stay exact: those with the numbers of a mask, counts, and one number for each row."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dct_compile.reasons import Reason
from tests.small_models import all_reduce, gather, leaf
from tests.tracing import trace

INF = float("inf")
PADDED = torch.arange(64) >= 50
FILLED: dict[str, Callable[[Tensor], Tensor]] = {
    "padded logits": lambda x: x.tanh().masked_fill(PADDED, -INF),
    "a large number": lambda x: x.tanh().masked_fill(PADDED, -1e9),
    "the largest of half precision": lambda x: x.tanh().masked_fill(PADDED, torch.finfo(torch.float16).min),
    "not a number": lambda x: x.tanh().masked_fill(PADDED, float("nan")),
    "where": lambda x: torch.where(PADDED, -1e4, x.tanh()),
    "an additive mask": lambda x: torch.zeros(16, 64).masked_fill(x < -1, -INF),
    "a causal mask": lambda x: torch.full((64, 64), -INF).triu(1),
    "added": lambda x: x.tanh() + torch.zeros(16, 64).masked_fill(x < -1, -INF),
    "times a mask": lambda x: x.tanh() + (1 - (x > 0).float()) * -10000.0,
    "scaled and moved": lambda x: (x.tanh().masked_fill(PADDED, -1e9) / 8).view(8, 2, 64).transpose(0, 1).bfloat16().float(),
    "gathered before": lambda x: gather(x.tanh().masked_fill(PADDED, -1e9).sin()).masked_fill(PADDED, -1e9),
    "a relu, filled": lambda x: x.relu().masked_fill(PADDED, -1e9),
    "log probabilities": lambda x: x.masked_fill(PADDED, -INF).log_softmax(-1),
}
COUNTED: dict[str, Callable[[Tensor], Tensor]] = {
    "a mask": lambda x: (x > 0).float(),
    "a mask with a number": lambda x: (x > 0) * 1.0,
    "one hot": lambda x: functional.one_hot(x.argmax(-1), 64).float(),
    "counts": lambda x: (x > 0).float().view(4, 4, 64).sum(1),
    "positions": lambda x: torch.arange(64).expand(16, 64).float() / 64,
    "sums of a softmax": lambda x: x.exp().view(2, 8, 64).sum(-1),
    "maxima": lambda x: x.view(2, 8, 64).amax(-1),
    "maxima with places": lambda x: x.view(2, 8, 64).max(-1).values,
    "means": lambda x: x.view(2, 8, 64).mean(2),
    "norms": lambda x: x.view(2, 8, 64).square().sum(-1).sqrt(),
    "variances": lambda x: x.view(2, 8, 64).var(-1),
    "the target's logit": lambda x: x.tanh().view(2, 8, 64).gather(-1, torch.zeros(2, 8, 1, dtype=torch.long)).squeeze(-1),
    "the target's logit, indexed": lambda x: x.tanh()[torch.arange(16), torch.arange(16)].view(2, 8),
    "the target's logit, masked": lambda x: x.view(2, 8, 64).amax(-1) * (torch.arange(8) > 3).float(),
}
COMPRESSED: dict[str, Callable[[Tensor], Tensor]] = {
    "filled with zeros": lambda x: x.tanh().masked_fill(PADDED, 0.0),
    "filled with a small number": lambda x: x.tanh().masked_fill(PADDED, -1.0),
    "behind a softmax": lambda x: x.masked_fill(PADDED, -INF).softmax(-1),
    "behind a layer": lambda x: x.masked_fill(PADDED, 1e4) @ torch.ones(64, 64),
    "masked by a product": lambda x: x.tanh() * (x > 0).float(),
    "scaled by a large number": lambda x: x.tanh() * 1000,
    "a row-parallel layer": lambda x: all_reduce(x.tanh() @ torch.ones(64, 64)).sin(),
    "a batch of products": lambda x: torch.einsum("bsd,de->bse", x.view(2, 8, 64), torch.ones(64, 64)),
    "pooled over positions": lambda x: x.tanh().view(2, 8, 64).sum(1),
    "pooled over pixels": lambda x: functional.adaptive_avg_pool2d(x.tanh().view(2, 16, 4, 8), 1).flatten(1),
    "normalised": lambda x: x / x.norm(dim=-1, keepdim=True),
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "some features": lambda x: x.tanh()[:, torch.arange(32)],
}


def _reasons(function: Callable[[Tensor], Tensor]) -> list[str]:
    traced = trace(lambda x: gather(function(x)).sin(), leaf(16, 64), activation_codec="int8")
    return [item.reason for item in traced.decisions if item.exchange.kind == "activation"]


@pytest.mark.parametrize("case", FILLED)
def test_mask_with_large_numbers_stays_dense(case: str) -> None:
    assert _reasons(FILLED[case])[-1] == Reason.FILLED


@pytest.mark.parametrize("case", COUNTED)
def test_counts_and_single_numbers_of_rows_stay_dense(case: str) -> None:
    assert _reasons(COUNTED[case]) == [Reason.COUNTED]


@pytest.mark.parametrize("case", COMPRESSED)
def test_activations_are_still_compressed(case: str) -> None:
    assert all("int8" in reason for reason in _reasons(COMPRESSED[case]))


def test_no_option_encodes_them() -> None:
    for codec in ("threshold", "int4", "bfloat16"):
        for function, reason in ((FILLED["padded logits"], Reason.FILLED), (COUNTED["one hot"], Reason.COUNTED)):
            traced = trace(lambda x, function=function: gather(function(x)).sin(), leaf(16, 64), activation_codec=codec)
            assert traced.decisions[0].reason == reason
