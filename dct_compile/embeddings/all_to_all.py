"""``torch.distributed.all_to_all_single`` with encoded rows, for autograd functions that Dynamo does not trace."""

from collections.abc import Sequence
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from dct_compile.embeddings.codec import RowCodec
from dct_compile.exchange import COMPRESSIBLE
from dct_compile.reasons import ENCODES_ITSELF

NAME = "dct_compile.all_to_all_single"


class DecodingWork(dist.Work):
    """An all_to_all of encoded rows that is under way: ``wait`` ends it and writes the decoded rows to ``output``."""

    def __init__(self, work: dist.Work, received: Tensor, output: Tensor, codec: RowCodec) -> None:
        super().__init__()
        self.work, self.received, self.output, self.codec = work, received, output, codec
        self.is_decoded = False

    def is_completed(self) -> bool:
        return self.work.is_completed()

    def wait(self, timeout: timedelta | None = None) -> bool:
        done = self.work.wait() if timeout is None else self.work.wait(timeout)
        if not self.is_decoded:
            self.output.detach().copy_(self.codec.decode(self.received, self.output.dtype).view_as(self.output))
            self.is_decoded = True
        return done


@torch.compiler.disable(reason=ENCODES_ITSELF)  # type: ignore[untyped-decorator]
def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    *,
    width: int | None = None,
    bits: int = 8,
) -> dist.Work | None:
    """Sends rows as integer codes with stochastic rounding, where ``torch.distributed.all_to_all_single`` would send them as they are.

    For autograd functions of your own, whose backward calls it as well. ``width`` and ``bits`` are the same on all ranks.

    Args:
        output: float32, bfloat16 or float16, contiguous; written to when the call returns, or with ``async_op`` in ``wait``.
        input: The same dtype, and the same sizes but for the first.
        output_split_sizes: Sizes of the shares of ``output`` by rank, along its first dimension. By default they are equal.
        input_split_sizes: Sizes of the shares of ``input``.
        group: The ranks; by default all.
        async_op: Whether to return at once.
        width: Elements of a row, such as those of an embedding vector: every share holds whole rows. By default the last dimension.
        bits: 8 or 4.

    Returns:
        With ``async_op``, a handle: its ``wait`` decodes. Else ``None``.

    Raises:
        ValueError: A size, dtype or split does not fit. The message names it.
    """
    ranks = dist.get_world_size(group)
    if ranks <= 1:
        work: dist.Work | None = dist.all_to_all_single(output, input, group=group, async_op=async_op)
        return work
    if width is None and input.dim() < 2:
        raise ValueError(f"input is {tuple(input.shape)}: name the numbers of an embedding vector, width=...")
    codec = RowCodec(input.shape[-1] if width is None else width, bits, NAME)
    _check_tensors(output, input)
    received_sizes = _encoded_splits("output", output, output_split_sizes, codec, ranks)
    sent_sizes = _encoded_splits("input", input, input_split_sizes, codec, ranks)
    payload = codec.encode(input)
    received = payload.new_empty(sum(received_sizes))
    started = dist.all_to_all_single(received, payload, received_sizes, sent_sizes, group=group, async_op=True)
    decoding = DecodingWork(started, received, output, codec)
    if async_op:
        return decoding
    decoding.wait()
    return None


def _check_tensors(output: Tensor, input: Tensor) -> None:
    for name, tensor in (("output", output), ("input", input)):
        if tensor.dtype not in COMPRESSIBLE:
            raise ValueError(f"{name} is {tensor.dtype}; float32, bfloat16 and float16 are encoded, torch.distributed exchanges all others")
    if output.dtype != input.dtype or output.shape[1:] != input.shape[1:]:
        of_output, of_input = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (output, input))
        raise ValueError(f"output is {of_output} and input is {of_input}; only their first sizes may differ")
    if not output.is_contiguous():
        raise ValueError(f"output has strides {output.stride()}, expected a contiguous tensor")


def _encoded_splits(name: str, tensor: Tensor, splits: Sequence[int] | None, codec: RowCodec, ranks: int) -> list[int]:
    """Returns the bytes of each rank's encoded share of ``tensor``."""
    length = tensor.shape[0]
    if splits is None and length % ranks:
        raise ValueError(f"{name} has a first size of {length}, which {ranks} ranks cannot share equally: name the splits")
    sizes = list(splits) if splits is not None else [length // ranks] * ranks
    if len(sizes) != ranks or sum(sizes) != length:
        raise ValueError(f"{name}_split_sizes is {sizes}, expected {ranks} sizes with the sum {length}")
    return [codec.size(size * prod(tensor.shape[1:])) for size in sizes]
