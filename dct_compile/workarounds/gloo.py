"""Keeps gloo groups from destroying the heap.

The two threads of a gloo group both write the name of an ended collective into one std::string (``ProcessGroupGloo::runLoop``). They take
no lock, and write after those who wait for the collective have gone on. A name of up to 15 characters lies in the string itself: the worst
is a wrong name. A longer one lies on the heap, where one thread frees what the other writes. Then a rank aborts sooner or later with
"malloc(): unaligned tcache chunk detected" or the like. Of the functional collectives, coalesced ones aside, only all_gather_into_tensor
has a longer name, ALLGATHER_COALESCED. Its variant with ``out`` does the same and is called ALLGATHER.

Versions of torch that need it, by three runs of the loop in ``tests/test_gloo.py`` without the guard: 2.13.0, 2.14.1 and 2.15.0 abort,
2.11.0 does not. The guard does no harm there.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

_c10d = torch.ops._c10d_functional


@cache
def shorten_names() -> torch.library.Library:
    """Lets all_gather_into_tensor on CPU tensors run as its variant with ``out``, in the whole process, compiled or not.

    It overrides torch's kernel of that operator, because the calls come from code that is not ours: a user's, and Inductor's.
    """
    library = torch.library.Library("_c10d_functional", "IMPL")
    library.impl("all_gather_into_tensor", _all_gather_into_tensor, "CPU")
    return library


def _all_gather_into_tensor(x: Tensor, group_size: int, group_name: Any) -> Tensor:
    out = x.new_empty((group_size * x.shape[0], *x.shape[1:]))
    gathered: Tensor = _c10d.all_gather_into_tensor_out(x, group_size, group_name, out=out)
    return gathered
