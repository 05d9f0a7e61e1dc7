"""Keeps gloo groups from destroying the heap.

The two threads of a gloo group both write the name of the collective that they have ended into one std::string, with no lock, and after
those who wait for it have gone on (``ProcessGroupGloo::runLoop``, torch 2.13). Names of up to 15 characters lie in the string itself: the
worst is a wrong name. Longer ones lie on the heap, where one thread frees what the other writes: sooner or later a rank aborts with
"malloc(): unaligned tcache chunk detected" or the like. Of the functional collectives, coalesced ones aside, only all_gather_into_tensor
has a longer name, ALLGATHER_COALESCED. Its variant with ``out`` does the same and is called ALLGATHER.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

_c10d = torch.ops._c10d_functional


@cache
def shorten_names() -> torch.library.Library:
    """From now on, all_gather_into_tensor on CPU tensors runs as its variant with ``out`` in this process, compiled or not."""
    library = torch.library.Library("_c10d_functional", "IMPL")
    library.impl("all_gather_into_tensor", _all_gather_into_tensor, "CPU")
    return library


def _all_gather_into_tensor(x: Tensor, group_size: int, group_name: Any) -> Tensor:
    out = x.new_empty((group_size * x.shape[0], *x.shape[1:]))
    gathered: Tensor = _c10d.all_gather_into_tensor_out(x, group_size, group_name, out=out)
    return gathered
