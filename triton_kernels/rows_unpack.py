"""``unpack_rows``, ``gather_rows``, ``scatter_rows``: from payloads to dense rows, and values that travel without their indices.

A boundary of model parallelism in forward is ``pack_rows``, a collective, ``unpack_rows``. Its backward sends back only what the mask of
the forward lets through: ``gather_rows`` on the side that unpacked, the transposed collective, ``scatter_rows`` on the side that packed.
Both sides have the payload, so no index travels ([Gupta21]: the same mask for the gradient).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dct_compile.triton_kernels.row_codec import check_row_payload, check_row_values, check_rows, decode_rows, round_to_value


def _sum_rows(values: Tensor, indices: Tensor, valid: Tensor, width: int) -> Tensor:
    """float32 [N, width]: for ``values`` [addends, N, slots] the sum over the addends, in their order, of each one's dense rows."""
    addends, rows, _ = values.shape
    out = torch.zeros(rows, width, device=values.device)
    for a in range(addends):
        # One more column takes what the invalid slots write.
        dense = torch.zeros(rows, width + 1, device=values.device)
        out += dense.scatter_(1, torch.where(valid[a], indices[a], width), values[a].float())[:, :width]
    return out


def unpack_rows_reference(
    payload: Tensor, row_shape: Sequence[int], slots: int, addends: int, value_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """Dense rows of a payload, or the sum of ``addends`` payloads that stand one after the other.

    ``payload``: uint8 [addends * R, inner * row_bytes]. Returns ``dtype`` [R, *row_shape], contiguous: zeros and the valid entries; with
    several addends their sum, accumulated in float32 in the order of the addends, then cast.
    Raises ValueError for a payload of another shape.
    """
    width = row_shape[-1]
    check_row_payload(payload, row_shape, slots, addends, value_dtype, dtype)
    values, indices, valid = (part.reshape(addends, -1, slots) for part in decode_rows(payload, width, slots, value_dtype))
    return _sum_rows(values, indices, valid, width).to(dtype).reshape(payload.shape[0] // addends, *row_shape)


def gather_rows_reference(grad: Tensor, payload: Tensor, slots: int, payload_dtype: torch.dtype, value_dtype: torch.dtype) -> Tensor:
    """The entries of ``grad`` at a payload's valid places.

    ``grad``: float32, bfloat16 or float16 [R, *row_shape], any strides. ``payload``: uint8 [A * R, inner * row_bytes], values of
    ``payload_dtype``; each of its A blocks of R rows reads the same gradient rows (the backward of a sum of A payloads). Returns
    ``value_dtype`` [A * R, inner * slots], rounded as in ``round_to_value``, 0 in slots that are not valid.
    Raises ValueError for a payload of another shape.
    """
    check_rows(grad)
    width = grad.shape[-1]
    check_row_payload(payload, grad.shape[1:], slots, grad.shape[0], payload_dtype, value_dtype)
    inner = math.prod(grad.shape[1:-1])
    _, indices, valid = decode_rows(payload, width, slots, payload_dtype)
    blocks = payload.shape[0] // max(grad.shape[0], 1)
    rows = grad.reshape(-1, width).float().repeat(blocks, 1)
    values = rows.gather(1, torch.where(valid, indices, 0))
    return round_to_value(torch.where(valid, values, 0), value_dtype).reshape(payload.shape[0], inner * slots)


def scatter_rows_reference(
    values: Tensor, payload: Tensor, row_shape: Sequence[int], slots: int, addends: int, payload_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """The counterpart of ``gather_rows``: dense rows with ``values`` at the payload's valid places.

    ``values``: float32, bfloat16 or float16 [addends * R, inner * slots]. ``payload``: uint8 [R, inner * row_bytes], values of
    ``payload_dtype``. Returns ``dtype`` [R, *row_shape], contiguous: zeros and, at the valid places, the sum over the addends, accumulated
    in float32 in their order, then cast. Raises ValueError for a payload or values of another shape.
    """
    width = row_shape[-1]
    check_row_payload(payload, row_shape, slots, 1, payload_dtype, dtype)
    check_row_values(values, payload, row_shape, slots, addends)
    _, indices, valid = decode_rows(payload, width, slots, payload_dtype)
    blocks = values.reshape(addends, -1, slots)
    shape = (addends, *indices.shape)
    return _sum_rows(blocks, indices.expand(shape), valid.expand(shape), width).to(dtype).reshape(payload.shape[0], *row_shape)
