"""The examples learn as well as without compression, send what the report says, and copies of a parameter stay equal."""

import pytest

from tests.rank_pool import Ranks
from tests.ranks_examples import EXAMPLES, compare
from tests.test_examples_shards import RATIOS as SHARDED
from tests.test_examples_trainers import PACKAGES

pytestmark = pytest.mark.distributed

RATIOS = {
    "ddp": 35,
    "data_parallel": 35,
    "tensor_parallel": 3.7,
    "sequence_parallel": 3.4,
    "expert_parallel": 8,
    "context_parallel": 6,
    "contrastive": 40,
}


@pytest.mark.parametrize("name", RATIOS)
def test_example_learns_and_sends_little(ranks2: Ranks, name: str) -> None:
    compare(ranks2, name, RATIOS[name], ".expert." if name == "expert_parallel" else None)


def test_every_example_is_tested() -> None:
    elsewhere = {"torchrec_dlrm", "dlrm_all_to_all", *PACKAGES}  # tests/test_examples_recommenders.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"language"} - elsewhere == {*RATIOS, *SHARDED}
