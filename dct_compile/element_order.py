"""The elements of a parameter: those that this rank holds, and the order in which they lie in a flat buffer if it is not row-major."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a DTensor, and any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class ElementOrder:
    """The elements of a tensor of ``shape`` lie in a flat buffer with ``dims`` from the outermost to the innermost one.

    DDP lays a gradient out in the order of its parameter's strides. The elements of a channels_last weight lie with (0, 2, 3, 1).
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "ElementOrder | None":
        """Returns the order of the elements of ``tensor`` in memory; ``None`` for row-major, and for gaps or overlaps between elements.

        For a parameter this is the order of its gradient under DDP: torch's reducer lays out one with gaps or overlaps row-major.
        """
        sizes, strides = tensor.shape, tensor.stride()
        long = [dim for dim, size in enumerate(sizes) if size != 1]
        dims = sorted(long, key=strides.__getitem__, reverse=True)
        dense = 1
        for dim in reversed(dims):
            if strides[dim] != dense:
                return None
            dense *= sizes[dim]
        if dims == long or dense == 0:
            return None
        return cls(tuple(sizes), (*dims, *(dim for dim, size in enumerate(sizes) if size == 1)))

    def to_row_major(self, flat: Tensor) -> Tensor:
        """Returns the elements [numel] of a buffer in row-major order: a copy."""
        outer = [self.dims.index(dim) for dim in range(len(self.dims))]
        return flat.view([self.shape[dim] for dim in self.dims]).permute(outer).reshape(-1)

    def to_buffer(self, flat: Tensor) -> Tensor:
        """Returns row-major elements [numel] in the order of the buffer: a copy."""
        return flat.view(self.shape).permute(self.dims).reshape(-1)
