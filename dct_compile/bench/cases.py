"""The measured cases: for every op of ``torch.ops.dct`` inputs, a floor of memory traffic, and baselines. A new op is a new entry.

In the formulas of the floors (floors.py):

    n  elements               g  bytes of an element (of the gradient or of the rows)
    P  bytes of a payload     v  bytes of a value on the wire (bfloat16: 2)
    R  rows of w elements     b  bytes of a payload's row
    k  entries of a row       i  bytes of an index (1 for w <= 256, else 2)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch._ops import OpOverload

from dct_compile import ops
from dct_compile.bench import baselines, floors, inputs
from dct_compile.bench.inputs import Inputs, Problem, Source
from dct_compile.triton_kernels.layout import COUNTERS
from dct_compile.triton_kernels.moments import prepare_moments_reference
from dct_compile.triton_kernels.quantize import dequantize_rows_reference, quantize_rows_reference
from dct_compile.triton_kernels.repack import repack_reference
from dct_compile.triton_kernels.rows_pack import pack_rows_reference
from dct_compile.triton_kernels.rows_unpack import gather_rows_reference, scatter_rows_reference, unpack_rows_reference
from dct_compile.triton_kernels.select_threshold import select_threshold_reference
from dct_compile.triton_kernels.store import store_reference
from dct_compile.triton_kernels.threshold_pack import threshold_pack_reference
from dct_compile.triton_kernels.unpack_accumulate import unpack_accumulate_reference, unpack_into_reference

BASELINES = ("eager", "inductor", "topk", "kthvalue", "sort")
"""The chain of PyTorch ops, the same chain compiled, and other ways to choose what is kept."""
ACTIVATION_WIDTHS = (256, 16384)
EMBEDDING_WIDTHS = (64, 1024)


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op in one of its variants.

    ``floor_bytes``: of memory that it has to read and write at least; ``formula`` says the same in the symbols of this module.
    ``baselines``: by the names of ``BASELINES``, called with the operands; "inductor" is the compiled "eager" and needs no entry.
    ``widths``: of the rows; none for the ops on gradients. ``streams``: whether it passes over the elements.
    ``rtol``: of a float32 result whose order of summation is not specified.
    """

    op: OpOverload
    variant: str
    reference: Callable[..., object]
    make: Callable[[Problem, Source], Inputs]
    floor_bytes: Callable[[Problem], int]
    formula: str
    baselines: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    has_density: bool = True
    streams: bool = True
    rtol: float = 0.0

    @property
    def op_name(self) -> str:
        """As in ``torch.ops.dct``."""
        return str(self.op.overloadpacket.__name__)

    def title(self, problem: Problem) -> str:
        """Op, variant and, where there are any, the width of the rows."""
        return f"{self.op_name}, {self.variant}" + (f", rows of {problem.width}" if self.widths else "")


_RANKED = {"topk": baselines.topk_threshold, "kthvalue": baselines.kthvalue_threshold, "sort": baselines.sort_threshold}

_SELECT = (
    Case(
        op=ops.select_threshold,
        variant="exact",
        reference=select_threshold_reference,
        make=partial(inputs.select_inputs, method="exact"),
        floor_bytes=floors.select_bytes,
        formula="n (g + 4)",
        baselines=_RANKED,
    ),
    Case(
        op=ops.select_threshold,
        variant="sampled",
        reference=select_threshold_reference,
        make=partial(inputs.select_inputs, method="sampled"),
        floor_bytes=floors.sampled_bytes,
        formula="lines of the samples",
        baselines=_RANKED,
    ),
    Case(
        op=ops.select_threshold,
        variant="laplace",
        reference=select_threshold_reference,
        make=partial(inputs.select_inputs, method="laplace"),
        floor_bytes=floors.select_bytes,
        formula="n (g + 4)",
        baselines={"eager": baselines.laplace_threshold},
        rtol=1e-6,
    ),
    Case(
        op=ops.select_threshold,
        variant="not due",
        reference=select_threshold_reference,
        make=partial(inputs.select_inputs, method="exact", step=1),
        floor_bytes=lambda problem: COUNTERS * torch.int64.itemsize,
        formula="40",
        streams=False,
    ),
)
_PACK = (
    Case(
        op=ops.threshold_pack,
        variant="error feedback",
        reference=threshold_pack_reference,
        make=inputs.pack_inputs,
        floor_bytes=floors.pack_bytes,
        formula="n (g + 8) + P",
        baselines={"eager": baselines.threshold_chain, "topk": baselines.topk_compression},
    ),
)
_UNPACK = tuple(
    Case(
        op=ops.unpack_accumulate,
        variant=f"{payloads} payloads",
        reference=unpack_accumulate_reference,
        make=partial(inputs.unpack_inputs, payloads=payloads),
        floor_bytes=partial(floors.unpack_bytes, payloads=payloads),
        formula=f"n g + {payloads} P",
        baselines={"eager": baselines.index_add},
    )
    for payloads in (2, 8)
)
_UNPACK_INTO = (
    Case(
        op=ops.unpack_into,
        variant="2 payloads",
        reference=unpack_into_reference,
        make=partial(inputs.unpack_into_inputs, payloads=2),
        floor_bytes=partial(floors.unpack_bytes, payloads=2),
        formula="n g + 2 P",
    ),
)
_REPACK = (
    Case(
        op=ops.repack,
        variant="4 payloads",
        reference=repack_reference,
        make=partial(inputs.repack_inputs, payloads=4),
        floor_bytes=partial(floors.repack_bytes, payloads=4),
        formula="8 n + 5 P",
        baselines={"eager": baselines.index_add_chain},
    ),
)
_PACK_ROWS = tuple(
    Case(
        op=ops.pack_rows,
        variant=method,
        reference=pack_rows_reference,
        make=partial(inputs.pack_rows_inputs, method=method),
        floor_bytes=partial(floors.rows_bytes, method=method),
        formula="n g + R b",
        baselines={"topk": baselines.topk_rows},
        widths=ACTIVATION_WIDTHS,
    )
    for method in ("exact", "laplace")
)
_MASKED_ROWS = (
    Case(
        op=ops.unpack_rows,
        variant="1 payload",
        reference=unpack_rows_reference,
        make=inputs.unpack_rows_inputs,
        floor_bytes=floors.rows_bytes,
        formula="n g + R b",
        baselines={"eager": baselines.scatter_dense},
        widths=ACTIVATION_WIDTHS,
    ),
    Case(
        op=ops.gather_rows,
        variant="1 payload",
        reference=gather_rows_reference,
        make=inputs.gather_rows_inputs,
        floor_bytes=floors.gather_bytes,
        formula="lines of the entries + R k (i + v)",
        baselines={"eager": baselines.gather_values},
        widths=ACTIVATION_WIDTHS,
    ),
    Case(
        op=ops.scatter_rows,
        variant="1 payload",
        reference=scatter_rows_reference,
        make=inputs.scatter_rows_inputs,
        floor_bytes=floors.rows_bytes,
        formula="n g + R k (i + v)",
        baselines={"eager": baselines.scatter_dense},
        widths=ACTIVATION_WIDTHS,
    ),
)
_QUANTIZED_ROWS = tuple(
    Case(
        op=op,
        variant=f"int{bits}",
        reference=reference,
        make=partial(make, bits=bits),
        floor_bytes=partial(floors.quantized_bytes, bits=bits),
        formula="n g + R b",
        baselines={"eager": chain},
        widths=EMBEDDING_WIDTHS,
        has_density=False,
    )
    for bits in (8, 4)
    for op, reference, make, chain in (
        (ops.quantize_rows, quantize_rows_reference, inputs.quantize_inputs, baselines.quantise),
        (ops.dequantize_rows, dequantize_rows_reference, inputs.dequantize_inputs, baselines.dequantise),
    )
)
_STORE = (
    Case(
        op=ops.store,
        variant="one tensor",
        reference=store_reference,
        make=inputs.store_inputs,
        floor_bytes=floors.store_bytes,
        formula="2 n g",
        has_density=False,
    ),
)
_MOMENTS = tuple(
    Case(
        op=ops.prepare_moments,
        variant=variant,
        reference=prepare_moments_reference,
        make=partial(inputs.moments_inputs, gaps=gaps),
        floor_bytes=partial(floors.moments_bytes, gaps=gaps),
        formula=formula,
    )
    for variant, gaps, formula in (("first moment", False, "2 n g"), ("with gaps", True, "2 n g + lines that an element arrives in"))
)

_GRADIENTS = (*_SELECT, *_PACK, *_UNPACK, *_UNPACK_INTO, *_REPACK)
CASES: tuple[Case, ...] = (*_GRADIENTS, *_PACK_ROWS, *_MASKED_ROWS, *_QUANTIZED_ROWS, *_STORE, *_MOMENTS)
"""Every op of ``torch.ops.dct``, variant by variant."""
