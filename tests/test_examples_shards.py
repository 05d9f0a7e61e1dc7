"""As `test_examples.py`, for the examples whose ranks hold parts of the parameters: shards, stages, meshes of two dimensions."""

import pytest

from tests.rank_pool import Ranks
from tests.ranks_examples import compare

pytestmark = pytest.mark.distributed

RATIOS = {
    "fsdp2": 3.5,
    "simple_fsdp": 3.5,
    "pipeline": 3.5,
    "hsdp": 3.5,
    "tensor_parallel_fsdp2": 3.5,
    "tensor_and_data_parallel": 4.5,
}
FOUR = ("hsdp", "tensor_parallel_fsdp2", "tensor_and_data_parallel")


@pytest.mark.parametrize("name", RATIOS)
def test_example_learns_and_sends_little(ranks2: Ranks, ranks4: Ranks, name: str) -> None:
    compare(ranks4 if name in FOUR else ranks2, name, RATIOS[name], "" if name == "pipeline" else None)
