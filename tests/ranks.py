"""Helpers of the functions that tests run on several ranks."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

import dct_compile


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Lets what is compiled and reported inside start from nothing: one process can hold several scenarios."""
    torch._dynamo.reset()
    dct_compile.reset_report()
    yield
    torch._dynamo.reset()


def digest(tensors: Iterable[Tensor]) -> str:
    """Returns the sha256 of the tensors' bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def exchanged(x: Tensor) -> Tensor:
    """Returns ``x`` [rows, ...] after an even all_to_all, in eager mode."""
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x)
    return received
