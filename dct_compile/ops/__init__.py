"""The operators ``torch.ops.dct.*``: schemas, fake implementations, and dispatch to the kernels."""

from dct_compile.ops.gradient import repack, select_threshold, threshold_pack, unpack_accumulate, unpack_into
from dct_compile.ops.moments import prepare_moments
from dct_compile.ops.rows import dequantize_rows, gather_rows, pack_rows, quantize_rows, scatter_rows, unpack_rows
from dct_compile.ops.state import store

__all__ = [
    "dequantize_rows",
    "gather_rows",
    "pack_rows",
    "prepare_moments",
    "quantize_rows",
    "repack",
    "scatter_rows",
    "select_threshold",
    "store",
    "threshold_pack",
    "unpack_accumulate",
    "unpack_into",
    "unpack_rows",
]
