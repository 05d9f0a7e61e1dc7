"""``store``: how a scheme that is written in plain PyTorch updates its state inside of a compiled graph."""

import torch
from torch import Tensor


def check_store(state: Tensor, value: Tensor) -> None:
    """Raises ValueError where ``value`` has not the shape and dtype of ``state``."""
    if value.shape != state.shape or value.dtype != state.dtype:
        found, expected = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (value, state))
        raise ValueError(f"value is {found}: expected {expected}, as the state")


@torch.no_grad()
def store_reference(state: Tensor, value: Tensor) -> None:
    """Copies ``value`` into ``state``, whose version counter stays: the backward of an earlier step may have saved the state.

    Args:
        state: Tensor of any shape and dtype, mutated.
        value: Tensor of the same shape and dtype.
    """
    state.data.copy_(value)
