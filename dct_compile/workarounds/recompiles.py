"""Keeps compilations that only look from using up the user's: Dynamo compiles one function at most ``recompile_limit`` times.

From torch 2.13 on, ``torch.compile`` counts on its own where it is asked to. Before, all compilations of a function count together, and
what exceeds the limit runs uncompiled.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo import convert_frame

_CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters


@contextmanager
def counted_apart() -> Iterator[dict[str, Any]]:
    """Yields arguments for ``torch.compile``. What it compiles with them until the context ends does not count for other compilations.

    Before torch 2.13, no limit holds within the context. Functions that nobody had compiled before it are forgotten at its end. Those of
    others keep what was compiled here, and it counts.
    """
    if _CAN_ISOLATE:
        yield {"isolate_recompiles": True}
        return
    before = {id(code) for code in _compiled_codes()}
    try:
        with dynamo_config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize):
            yield {}
    finally:
        for code in _compiled_codes():
            if id(code) not in before:
                reset_code(code)


def _compiled_codes() -> list[CodeType]:
    seen = (reference() for reference in convert_frame.input_codes.seen)
    return [code for code in seen if code is not None and _debug_get_cache_entry_list(code)]
