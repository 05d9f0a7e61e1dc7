"""The geometry of a bucket's payload."""

import pytest
import torch

from dct_compile.triton_kernels.layout import WHOLE_PIECE, GradientLayout, choose_block


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
