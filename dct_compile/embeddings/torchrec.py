"""torchrec: its sharded modules exchange embeddings from autograd functions of their own. A codec makes integer rows of them.

::

    pooled embeddings   [B, D of this rank]       encode, all_to_all_single (torchrec's own, asynchronous), decode
    their gradients     [B of this rank, D]       encode, all_to_all_single, decode

Pooled embeddings of tables that are sharded by rows are sums over ranks: see ``torchrec_sums``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any, TypeVar

import torch
from torch import Tensor

from dct_compile.embeddings.codec import RowCodec
from dct_compile.embeddings.sums import RowCodecs
from dct_compile.embeddings.torchrec_sums import encode_sums
from dct_compile.reasons import ENCODES_ITSELF
from dct_compile.triton_kernels.quantize import largest_code

NAME = "dct_compile.torchrec_sharder"
SUMMED = "POOLED_EMBEDDINGS_REDUCE_SCATTER"
"""The name of sums over ranks in torchrec's registry of codecs."""
Sharder = TypeVar("Sharder")


@dataclass
class Context:
    """What torchrec keeps from ``encode`` to ``decode``. ``dtype``: of the embeddings. The others are for codecs that pad."""

    dtype: torch.dtype = torch.float32
    row_dim: int = -1
    padded_dim_sum_per_rank: list[int] | None = None


@dataclass(frozen=True)
class Codec:
    """The interface of torchrec's ``QuantizedCommCodec`` in front of a :class:`RowCodec`: flat tensors, shares of whole vectors."""

    rows: RowCodec

    @property
    def quantized_dtype(self) -> torch.dtype:
        return torch.uint8

    def create_context(self) -> Context:
        return Context()

    def encode(self, input_tensor: Tensor, ctx: Context) -> Tensor:
        """Encodes a tensor.

        Raises:
            RuntimeError: Autograd would have to pass through the codes.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{NAME}: torchrec exchanges embeddings by its synchronous collectives here, as within torchrec_use_sync_collectives(), and"
                " their gradient would be lost in integer codes; leave these collectives, or take the sharder as it was"
            )
        ctx.dtype = input_tensor.dtype
        return self.rows.encode(input_tensor)

    def decode(self, input_grad: Tensor, ctx: Context) -> Tensor:
        return self.rows.decode(input_grad, ctx.dtype)

    def calc_quantized_size(self, input_len: int, ctx: Context) -> int:
        return self.rows.size(input_len)

    def padded_size(self, input_tensor: Tensor, dim_per_rank: list[int], my_rank: int, qcomm_ctx: Context) -> tuple[int, int]:
        """Returns the elements of a row of ``input_tensor``, and that none is added."""
        return input_tensor.shape[-1], 0


def torchrec_sharder(sharder: Sharder, bits: int = 8) -> Sharder:
    """Lets a sharder of torchrec make modules that exchange embeddings, and their gradients, as rows of integer codes.

    ``sharders=[dct_compile.torchrec_sharder(EmbeddingBagCollectionSharder())]``. A row is an embedding vector, or the largest part that
    divides the vectors of all tables. Its modules run outside of compiled graphs, and wait for their exchange.

    Row-wise tables add up over ranks: decoded rows are added up in float32. Where several hosts have several ranks each, as torchrun tells,
    the ranks of a host add up dense before. A codec that ``sharder`` has for ``POOLED_EMBEDDINGS_REDUCE_SCATTER`` stays.

    Args:
        sharder: ``EmbeddingBagCollectionSharder`` or ``EmbeddingCollectionSharder``; changed in place.
        bits: 8 or 4.

    Returns:
        ``sharder``.

    Raises:
        TypeError: ``sharder`` takes no codecs.
        ValueError: ``bits`` is neither 8 nor 4.
    """
    if not all(hasattr(sharder, name) for name in ("shard", "qcomm_codecs_registry", "_qcomm_codecs_registry")):
        raise TypeError(f"{type(sharder).__name__} is no sharder of torchrec that takes codecs, such as EmbeddingBagCollectionSharder")
    largest_code(bits)
    given, shard = sharder.qcomm_codecs_registry or {}, sharder.shard  # type: ignore[attr-defined]

    def shard_encoded(module: Any, params: Mapping[str, Any], *args: Any, **settings: Any) -> Any:
        width = _width(params)
        codecs = RowCodecs(RowCodec(width, bits, NAME), RowCodec(width, bits, NAME, number=1))
        sharder._qcomm_codecs_registry = {**given, **_registry(codecs)}  # type: ignore[attr-defined]
        sharded = shard(module, params, *args, **settings)
        if SUMMED not in given:
            encode_sums(sharded, codecs)
        sharded.forward = torch.compiler.disable(partial(_finished, sharded.forward), reason=ENCODES_ITSELF)
        return sharded

    sharder.shard = shard_encoded  # type: ignore[attr-defined]
    return sharder


def _finished(forward: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Calls the forward of a sharded module, and waits for its exchange. Dynamo is to trace neither.

    It would make torchrec take collectives through which autograd passes, and it gives up a function that waits.
    """
    found = forward(*args, **settings)
    return found.wait() if hasattr(type(found), "wait") else found


def _registry(codecs: RowCodecs) -> dict[str, Any]:
    """Returns codecs for the exchanges that add nothing up, in torchrec's form."""
    from torchrec.distributed.types import CommOp, QuantizedCommCodecs

    given = QuantizedCommCodecs(forward=Codec(codecs.forward), backward=Codec(codecs.backward))
    return {op.name: given for op in (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL)}


def _width(params: Mapping[str, Any]) -> int:
    """Returns the largest width that divides every vector that the sharded tables hold, 1 where none is exchanged."""
    specs = [item.sharding_spec for item in params.values() if item.sharding_spec is not None]
    return gcd(*(shard.shard_sizes[-1] for spec in specs for shard in spec.shards)) or 1
