"""A small set of images in the files of Fashion-MNIST."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    """Writes an array of bytes in the IDX format, compressed with gzip."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


def write_images(folder: Path, train: int, test: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Writes images whose brightest rows tell their label; returns pixels and labels of both parts, the training part first."""
    generator = np.random.default_rng(0)
    labels = np.arange(train + test, dtype=np.uint8) % 10
    pixels = generator.integers(0, 100, (train + test, 28, 28), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[3 + 2 * label : 5 + 2 * label] += 150
    for part, rows in (("train", slice(0, train)), ("t10k", slice(train, None))):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", pixels[rows])
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels[rows])
    return pixels, labels
