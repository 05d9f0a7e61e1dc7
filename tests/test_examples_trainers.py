"""The examples of other people's trainers: they learn, gradients travel compressed, their optimizers are adapted, copies stay equal."""

import os
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

import dct_compile
from tests.rank_pool import Ranks
from tests.ranks_examples import example

pytestmark = pytest.mark.distributed
STEPS = 60
PACKAGES = {"accelerate_ddp": "accelerate", "lightning_fit": "lightning", "transformers_trainer": "transformers"}


class Trained(NamedTuple):
    """``ways``: how the optimizer has stepped the compressed parameters. ``total``: the sum of all parameters."""

    loss: float
    ratio: float
    ways: set[str | None]
    notes: list[str]
    total: float


def trained(rank: int, world_size: int, name: str, options: dict[str, Any]) -> Trained:
    # Trainers ask the variables of torchrun, though the process group is there.
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    with patch.dict(os.environ, {key: str(value) for key, value in launched.items()}):
        loss, model = example(name).train({"link": None, **options}, STEPS)
    report = dct_compile.report()
    ways = {site.stepped for site in report.sites if site.decision == "compressed"}
    total = sum(parameter.detach().double().sum().item() for parameter in model.parameters())
    return Trained(loss, report.dense_bytes / report.wire_bytes, ways, list(report.notes), total)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_trainer_learns_and_sends_little(ranks2: Ranks, name: str) -> None:
    pytest.importorskip(PACKAGES[name], reason=f"{PACKAGES[name]} is not installed: make setup")
    dense, _ = ranks2(trained, name, {"dp_density": 1.0})
    results = ranks2(trained, name, {})
    for result in results:
        assert result.ratio > 40
        assert result.loss < dense.loss + 0.4  # elements wait for a hundred steps
        assert all(str(way).startswith("bypass") for way in result.ways), result.ways
        assert not [note for note in result.notes if "not known" in note]
    assert results[0].total == results[1].total
