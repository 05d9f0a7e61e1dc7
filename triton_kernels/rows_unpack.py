"""``unpack_rows``, ``gather_rows``, ``scatter_rows``: from payloads to dense rows, and values that travel without their indices.

A boundary of model parallelism in forward is ``pack_rows``, a collective, ``unpack_rows``. Its backward sends back only what the mask of
the forward lets through: ``gather_rows`` on the side that unpacked, the transposed collective, ``scatter_rows`` on the side that packed.
Both sides have the payload, so no index travels ([Gupta21]: the same mask for the gradient).
"""

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import RowLayout
from dct_compile.triton_kernels.row_codec import decode_rows, round_to_value


def _sum_rows(values: Tensor, indices: Tensor, valid: Tensor, width: int) -> Tensor:
    """float32 [N, width]: for ``values`` [addends, N, capacity] the sum over the addends, in their order, of each one's dense rows."""
    addends, rows, _ = values.shape
    out = torch.zeros(rows, width, device=values.device)
    for a in range(addends):
        # One more column takes what the invalid entries write.
        dense = torch.zeros(rows, width + 1, device=values.device)
        out += dense.scatter_(1, torch.where(valid[a], indices[a], width), values[a].float())[:, :width]
    return out


def unpack_rows_reference(payload: Tensor, layout: RowLayout, addends: int, dtype: torch.dtype) -> Tensor:
    """Dense rows of a payload, or the sum of ``addends`` payloads that stand one after the other.

    ``payload``: uint8 [addends * R, inner * row_bytes]. Returns ``dtype`` [R, *row_shape], contiguous: zeros and the valid entries; with
    several addends their sum, accumulated in float32 in the order of the addends, then cast.
    """
    values, indices, valid = (part.reshape(addends, -1, layout.capacity) for part in decode_rows(payload, layout))
    return _sum_rows(values, indices, valid, layout.width).to(dtype).reshape(payload.shape[0] // addends, *layout.row_shape)


def gather_rows_reference(grad: Tensor, payload: Tensor, layout: RowLayout, value_dtype: torch.dtype) -> Tensor:
    """Returns the entries of ``grad`` at a payload's valid indices.

    ``grad``: float32, bfloat16 or float16 [R, *row_shape], any strides. ``payload``: uint8 [A * R, inner * row_bytes]; each of its A
    blocks of R rows reads the same gradient rows (the backward of a sum of A payloads). Returns ``value_dtype`` [A * R, inner * capacity],
    rounded as in ``round_to_value``, 0 in entries that are not valid.
    """
    _, indices, valid = decode_rows(payload, layout)
    blocks = payload.shape[0] // max(grad.shape[0], 1)
    rows = grad.reshape(-1, layout.width).float().repeat(blocks, 1)
    values = rows.gather(1, torch.where(valid, indices, 0))
    return round_to_value(torch.where(valid, values, 0), value_dtype).reshape(payload.shape[0], layout.inner * layout.capacity)


def scatter_rows_reference(values: Tensor, payload: Tensor, layout: RowLayout, addends: int, dtype: torch.dtype) -> Tensor:
    """Returns the counterpart of ``gather_rows``: dense rows with ``values`` at the payload's valid indices.

    ``values``: float32, bfloat16 or float16 [addends * R, inner * capacity]. ``payload``: uint8 [R, inner * row_bytes]. Returns ``dtype``
    [R, *row_shape], contiguous: zeros and, at the valid indices, the sum over the addends, accumulated in float32 in their order, then
    cast.
    """
    _, indices, valid = decode_rows(payload, layout)
    blocks = values.reshape(addends, -1, layout.capacity)
    shape = (addends, *indices.shape)
    total = _sum_rows(blocks, indices.expand(shape), valid.expand(shape), layout.width)
    return total.to(dtype).reshape(payload.shape[0], *layout.row_shape)
