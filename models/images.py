"""Labelled images as tensors in memory, and what varies them for training."""

import gzip
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dct_compile.models.recipes import FASHION_MNIST
from dct_compile.models.sources import MissingData

_MEAN, _DEVIATION = 0.2860, 0.3530
"""Of the pixels of Fashion-MNIST's training part, as fractions of white."""


@dataclass(frozen=True)
class Images:
    """``pixels`` uint8 [N, height, width], ``labels`` int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@lru_cache(maxsize=1)
def fashion_mnist(folder: Path = FASHION_MNIST) -> tuple[Images, Images]:
    """Returns Fashion-MNIST's training part (60,000 images) and test part (10,000), from the four gzip files of its authors.

    Raises:
        MissingData: A file is not there.
        ValueError: A file is broken; the message names it.
    """
    train, test = (_read_part(folder, part) for part in ("train", "t10k"))
    return train, test


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Reads an array of bytes in the IDX format, compressed with gzip.

    Args:
        path: The file.
        dimensions: How many dimensions the array must have.

    Raises:
        MissingData: The file is not there.
        ValueError: It is broken, or holds another kind of array.
    """
    if not path.is_file():
        raise MissingData(
            f"{path} does not exist: get the data with `apt-get install -y dataset-fashion-mnist`, "
            "or name the folder of its four files with --fashion-mnist-path"
        )
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    # Two zeros, the type (8: unsigned bytes), the number of dimensions; then each dimension as a big-endian int32.
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise ValueError(f"{path} is not an IDX file of bytes in {dimensions} dimensions: it starts with {content[:4].hex(' ')}")
    shape = tuple(np.frombuffer(content[4:header], dtype=">i4").tolist())
    if len(content) - header != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} says it holds {'x'.join(map(str, shape))} bytes; {len(content) - header} follow its header")
    return np.frombuffer(content[header:], dtype=np.uint8).reshape(shape)


def normalized(pixels: Tensor) -> Tensor:
    """Returns ``pixels`` uint8 [n, height, width] as float32 [n, 1, height, width], of mean 0 and deviation 1 over the training part."""
    return ((pixels.float() / 255 - _MEAN) / _DEVIATION).unsqueeze(1)


def shifted(pixels: Tensor, down: Tensor, right: Tensor, flipped: Tensor) -> Tensor:
    """Moves and mirrors each image; what it leaves is black.

    Args:
        pixels: uint8 [n, height, width].
        down: Pixels that each image moves down, int64 [n]; negative: up.
        right: Pixels that each image moves to the right, before it is mirrored, int64 [n]; negative: to the left.
        flipped: Whether each image is mirrored left to right, bool [n].

    Returns:
        uint8 [n, height, width].
    """
    count, height, width = pixels.shape
    border = int(torch.cat([down, right]).abs().max())
    padded = torch.nn.functional.pad(pixels, (border,) * 4)
    rows = torch.arange(height) + border - down[:, None]
    columns = torch.arange(width) + border - right[:, None]
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _read_part(folder: Path, part: str) -> Images:
    pixels, labels = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3), read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
    if len(pixels) != len(labels):
        raise ValueError(f"{folder}: {part} has {len(pixels)} images and {len(labels)} labels")
    return Images(torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64)))
