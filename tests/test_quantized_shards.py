"""The scheme for shards of parameters and their gradients, without ranks."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dct_compile.config import DCTConfig
from dct_compile.exchange import PARAMETER, SHARDED_GRADIENT, Exchange, Parameter, segments_of
from dct_compile.integrations.fsdp_comms import factor_of
from dct_compile.passes.collectives import GATHER, SCATTER
from dct_compile.passes.plan import decide
from dct_compile.reasons import Reason
from dct_compile.schemes.quantized_shards import BLOCK, QuantizedShards, ShardCodec

NUMELS = {"norm": 40, "up": 700, "down": 256, "bias": 128}


def exchange_of(kind: str, numels: dict[str, int] | None = None, dtype: torch.dtype = torch.float32, ranks: int = 4) -> Exchange:
    members = [Parameter(index, name, (numel,)) for index, (name, numel) in enumerate((numels or NUMELS).items())]
    numel = sum(member.numel for member in members)
    sums = kind == SHARDED_GRADIENT
    size = numel * dtype.itemsize * (ranks if sums else 1)
    found = Exchange(SCATTER if sums else GATHER, kind, "shards", (size // dtype.itemsize,), dtype, "group", ranks, 1, size)
    return replace(found, segments=segments_of(members), reduce_op="avg" if sums else "")


def codec_of(kind: str = PARAMETER, dtype: torch.dtype = torch.float32, **options: Any) -> ShardCodec:
    offer = decide(exchange_of(kind, dtype=dtype), DCTConfig(**options)).offer
    assert isinstance(offer, QuantizedShards)
    return offer.codec


def there_and_back(codec: ShardCodec, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    payload = codec.encode(x, 0, "", "")
    assert payload.shape == (x.shape[0], codec.payload_bytes)
    return codec.decode(payload, dtype or x.dtype, "", "")


@pytest.mark.parametrize(("codec", "levels"), [("int8", 127), ("int4", 7), ("bfloat16", 256)])
@pytest.mark.parametrize("rows", [1, 3])
def test_values_come_back_within_a_step_and_small_parameters_exactly(codec: str, levels: int, rows: int) -> None:
    x = torch.randn(rows, sum(NUMELS.values()))
    x[:, 40:740] *= 100
    found = there_and_back(codec_of(parameter_codec=codec), x)
    assert torch.equal(found[:, :40], x[:, :40])
    for part, own in zip(found.split(list(NUMELS.values()), 1), x.split(list(NUMELS.values()), 1), strict=True):
        assert (part - own).abs().max() <= 1.01 * own.abs().max() / levels
    assert not torch.equal(found, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(2, sum(NUMELS.values())).to(dtype)
    codec = codec_of(SHARDED_GRADIENT, dtype)
    found = there_and_back(codec, x, torch.float32)
    torch.testing.assert_close(found, x.float(), rtol=0, atol=0.05)
    assert torch.equal(found[:, :40], x[:, :40].float())


def test_bytes_of_the_payload() -> None:
    blocks = 3 + 1 + 1
    assert codec_of().payload_bytes == blocks * (BLOCK + 2) + 40 * 4
    assert codec_of(parameter_codec="int4").payload_bytes == blocks * (BLOCK // 2 + 2) + 40 * 4
    assert codec_of(parameter_codec="bfloat16", exempt=["up"]).payload_bytes == 2 * (256 + 128) + 4 * (40 + 700)
    reduce = decide(exchange_of(SHARDED_GRADIENT), DCTConfig())
    assert reduce.wire_bytes == 3 * codec_of().payload_bytes
    assert reduce.dense_bytes == 3 * 4 * sum(NUMELS.values())


def test_parameters_do_not_share_a_block() -> None:
    x = torch.zeros(1, sum(NUMELS.values()))
    x[:, 40:740], x[:, 740:996] = 1e6, torch.full((256,), 1e-3)
    assert there_and_back(codec_of(), x)[:, 740:996].allclose(torch.tensor(1e-3), rtol=0.02)


def test_rounding_is_unbiased_and_repeats_itself() -> None:
    codec = replace(codec_of(), blocks=((0, BLOCK),), exact=())
    x = torch.full((4000, BLOCK), 0.3)
    x[:, 0] = 127.0
    found = there_and_back(codec, x)
    assert set(found[:, 1:].unique().tolist()) == {0.0, 1.0}
    assert float(found[:, 1:].mean()) == pytest.approx(0.3, abs=0.005)
    assert torch.equal(there_and_back(codec, x), found)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    x = torch.randn(1, sum(NUMELS.values()))
    x[0, 0] = x[0, 100] = value
    found = there_and_back(codec_of(), x)[0]
    assert not found[0].isfinite()
    assert found[40 : 40 + BLOCK].isnan().all()
    assert found[40 + BLOCK :].isfinite().all()


def test_a_step_without_some_parameters_has_another_size() -> None:
    for options in ({}, {"parameter_codec": "bfloat16"}):
        x = torch.randn(2, 300)
        torch.testing.assert_close(there_and_back(codec_of(**options).of(300), x), x, rtol=0, atol=0.05)


SMALL = {"bias": 20, "norm": 30}
DECLINED: list[tuple[Exchange, dict[str, Any], str]] = [
    (exchange_of(PARAMETER), {"parameter_codec": "dense"}, Reason.PARAMETER_DENSE),
    (exchange_of(SHARDED_GRADIENT), {"sharded_gradients": "dense"}, Reason.SHARDED_DENSE),
    (
        exchange_of(PARAMETER, dtype=torch.float16),
        {"parameter_codec": "bfloat16"},
        Reason.ALREADY_SMALL.format(dtype="float16", codec="bfloat16"),
    ),
    (exchange_of(PARAMETER, SMALL), {}, Reason.MIN_NUMEL.format(min_numel=128)),
    (exchange_of(PARAMETER, SMALL), {"min_numel": 0}, Reason.SHORT_SHARD.format(codec="int8")),
    (exchange_of(PARAMETER), {"exempt": ["*"]}, Reason.MIN_NUMEL.format(min_numel=128) + "; " + Reason.EXEMPT.format(pattern="*")),
    (exchange_of(PARAMETER, ranks=1), {}, Reason.ONE_RANK),
    (exchange_of(PARAMETER, dtype=torch.uint8), {}, Reason.DTYPE.format(dtype="uint8")),
]


@pytest.mark.parametrize(("exchange", "options", "reason"), DECLINED, ids=lambda item: str(item)[:30])
def test_reasons_to_stay_dense(exchange: Exchange, options: dict[str, Any], reason: str) -> None:
    decision = decide(exchange, DCTConfig(**options))
    assert (decision.compressed, decision.reason) == (False, reason)


def test_factors_of_reduce_operations() -> None:
    assert factor_of(dist.ReduceOp.AVG, 4) == factor_of(dist.ReduceOp(dist.ReduceOp.AVG), 4) == 0.25
    assert factor_of(dist.ReduceOp.SUM, 4) == 1
    for make in (dist._make_nccl_premul_sum, dist.ReduceOp.PREMUL_SUM):  # FSDP calls the one or the other, by the version of torch
        if callable(make):
            assert factor_of(make(0.125), 4) == 0.125
