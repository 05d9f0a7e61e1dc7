"""The codec of "quantized_rows" for exchanges outside of graphs: flat tensors of rows, encoded and decoded eagerly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dct_compile.runtime import RUNTIME
from dct_compile.schemes.quantized import Coding
from dct_compile.triton_kernels.quantize import largest_code


@dataclass(frozen=True)
class RowCodec:
    """Rows of ``width`` elements as codes of ``bits`` bits, with one bfloat16 scale each, rounded stochastically.

    ``name``: the public function that made it, which the report names. ``number``: tells the seeds of two codecs apart.

    Raises:
        ValueError: ``width`` or ``bits`` is not allowed.
    """

    width: int
    bits: int
    name: str
    number: int = 0

    def __post_init__(self) -> None:
        largest_code(self.bits)
        if self.width < 1:
            raise ValueError(f"width is {self.width}; allowed is 1 or more, the numbers of an embedding vector")

    @property
    def _coding(self) -> Coding:
        return Coding(self.bits, self.width)

    def size(self, numel: int) -> int:
        """Returns the bytes of ``numel`` encoded elements.

        Raises:
            ValueError: They are not whole rows.
        """
        if numel % self.width:
            raise ValueError(f"{numel} elements are no whole rows of {self.width}: a share has to hold whole embedding vectors")
        return numel // self.width * self._coding.block_bytes

    def encode(self, x: Tensor) -> Tensor:
        """Encodes all elements of ``x``, and counts them for the report.

        Args:
            x: float32, bfloat16 or float16, any shape; every ``width`` elements make a row.

        Returns:
            uint8 [size(x.numel())].
        """
        size = self.size(x.numel())
        rows = x.detach().reshape(x.numel() // self.width, self.width)
        RUNTIME.reports.count_encoded(self.name, x.numel() * x.itemsize, size)
        return self._coding.encode(rows, self.number).reshape(size)

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor:
        """Decodes what :meth:`encode` has made, as ``dtype`` [elements]."""
        row_bytes = self._coding.block_bytes
        return self._coding.decode(payload.reshape(payload.numel() // row_bytes, row_bytes), dtype).reshape(-1)
