"""The geometry of a bucket's payload."""

import pytest
import torch

from dct_compile.triton_kernels.layout import COUNTERS, WHOLE_PIECE, GradientLayout, choose_block
from dct_compile.triton_kernels.shares import place_of, share_numel
from dct_compile.triton_kernels.threshold_pack import threshold_pack_reference


@pytest.mark.parametrize(
    ("density", "numel", "block"),
    [
        (0.01, 10**6, 256),
        (0.001, 10**6, 4096),
        (0.0002, 10**6, WHOLE_PIECE),
        (0.0002, WHOLE_PIECE, WHOLE_PIECE),
        (0.0002, WHOLE_PIECE + 1, 4096),
    ],
)
def test_block_with_the_fewest_bytes(density: float, numel: int, block: int) -> None:
    assert choose_block(density, numel) == block


def test_a_segment_too_large_for_one_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="a segment of 2147483649 elements cannot be one block"):
        GradientLayout(((0, WHOLE_PIECE + 1),), WHOLE_PIECE, 1, -1, 0.001, torch.float32)


def owners_of(numel: int, chunks: int) -> torch.Tensor:
    """The chunk whose share holds each element; every element must be in one share, once."""
    owners = torch.full((numel,), -1)
    for chunk in range(chunks):
        places = place_of(torch.arange(share_numel(numel, chunks, chunk)), chunks, chunk)
        assert (owners[places] == -1).all()
        owners[places] = chunk
    assert (owners >= 0).all()
    return owners


@pytest.mark.parametrize("chunks", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 700, 256 * 40, 256 * 100 + 7])
def test_every_element_is_in_one_share_and_shares_differ_by_a_unit_at_most(numel: int, chunks: int) -> None:
    owners_of(numel, chunks)
    sizes = [share_numel(numel, chunks, chunk) for chunk in range(chunks)]
    assert max(sizes) - min(sizes) <= 256


def test_units_go_to_the_owners_in_turn() -> None:
    found = owners_of(256 * 4 * 16 * 5, 4).view(5, 16, 4, 256)
    assert (found == found[:, :1, :, :1]).all()
    assert found[:, 0, :, 0].tolist() == [[0, 1, 2, 3], [2, 3, 0, 1], [0, 1, 2, 3], [1, 2, 3, 0], [3, 0, 1, 2]]


def test_with_one_owner_the_share_is_the_parameter() -> None:
    assert torch.equal(place_of(torch.arange(5000), 1, 0), torch.arange(5000))


@pytest.mark.parametrize("chunks", [2, 4, 8])
@pytest.mark.parametrize("width", [512, 1024, 4096, 3 * 1024])
def test_every_share_has_all_columns_of_a_matrix_alike(width: int, chunks: int) -> None:
    """Each band of 256 columns, over 1024 rows: no owner has more than 1.5 times its part."""
    owners = owners_of(1024 * width, chunks).view(1024, width)[:, ::256]
    for band in owners.T:
        assert int(band.bincount(minlength=chunks).max()) <= 1.5 * 1024 / chunks


@pytest.mark.parametrize("block", [256, 4096, WHOLE_PIECE])
def test_frequent_rows_do_not_overflow_a_share(block: int) -> None:
    """All large entries stand in the first tenth of a parameter, as in an embedding that is sorted by frequency."""
    layout = GradientLayout(((0, 100_000),), block, 4, -1, 0.011, torch.bfloat16)
    grad = torch.zeros(100_000)
    grad[:10_000:10] = 1.0
    counters = torch.zeros(1, COUNTERS, dtype=torch.int64)
    threshold_pack_reference(grad, torch.zeros(100_000), torch.tensor([0.5]), counters, layout, True)
    assert counters.tolist() == [[1, 1000, 0, 0, 1000]]
