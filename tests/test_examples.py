"""The examples learn as well as without compression, send what the report says, and copies of a parameter stay equal."""

import pytest
import torch

from tests.rank_pool import Ranks
from tests.ranks_examples import DENSE, EXAMPLES, STEPS, Trained, trained

pytestmark = pytest.mark.distributed

RATIOS = {
    "ddp": 35,
    "data_parallel": 35,
    "tensor_parallel": 3.7,
    "sequence_parallel": 3.4,
    "expert_parallel": 8,
    "context_parallel": 6,
    "contrastive": 40,
    "tensor_and_data_parallel": 4.5,
    "tensor_parallel_fsdp2": 3.5,
    "fsdp2": 3.5,
    "simple_fsdp": 3.5,
    "hsdp": 3.5,
    "pipeline": 3.5,
}
"""By how much fewer bytes a step sends at least, by the report."""
SHARDS = {"expert_parallel": ".expert.", "pipeline": ""}
"""Names of parameters that each rank has of its own."""
RANKS = {"tensor_and_data_parallel": 4, "tensor_parallel_fsdp2": 4, "hsdp": 4}
UNCOUNTED = 40_000
"""Bytes per step of what the report names and does not count: DTensor's gradients of norms, the tokens of experts."""
HEADERS = 144 * 1.2
"""Bytes around a message of gloo, and some for the ends of the training."""


@pytest.mark.parametrize("name", RATIOS)
def test_example_learns_and_sends_little(ranks2: Ranks, ranks4: Ranks, name: str) -> None:
    ranks = {2: ranks2, 4: ranks4}[RANKS.get(name, 2)]
    dense, compressed = (ranks(trained, name, options) for options in (DENSE, {}))
    for plain, result in zip(dense, compressed, strict=True):
        assert result.dense / result.wire > RATIOS[name], result.report
        # Elements of a gradient wait for a hundred steps: so short a training is behind. Both begin at 2.77.
        assert result.loss < plain.loss + (0.6 if "density" in result.report else 0.05), result.report
        assert result.loss < 2.6
        assert plain.measured > 0.6 * min(RATIOS[name], 20) * result.measured
    check_bytes(compressed)
    check_copies(compressed, SHARDS.get(name))


def check_bytes(results: list[Trained]) -> None:
    """Compares the means over the ranks with the sockets."""
    measured, reported = (sum(values) / len(results) for values in zip(*((r.measured, r.wire * STEPS) for r in results), strict=True))
    overhead = STEPS * results[0].messages * 4 * HEADERS * (len(results) - 1)
    overhead += STEPS * sum(UNCOUNTED for note in ("not counted", "run time only") if note in results[0].report)
    parameters = sum(copy.numel() * copy.itemsize for copy in results[0].copies.values())  # made equal at the start
    assert 0.9 * reported <= measured <= 1.02 * reported + overhead + 3 * parameters, results[0].report


def check_copies(results: list[Trained], own: str | None) -> None:
    for name in {name for name in results[0].copies if own is None or own not in name}:
        assert all(torch.equal(result.copies[name], results[0].copies[name]) for result in results), name


def test_every_example_is_tested() -> None:
    elsewhere = {"torchrec_dlrm", "dlrm_all_to_all"}  # tests/test_examples_recommenders.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"language"} - elsewhere == set(RATIOS)
