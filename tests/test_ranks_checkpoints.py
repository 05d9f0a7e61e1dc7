"""Checkpoints of several ranks, by the code of docs/checkpoints.md: saved by some ranks, loaded by others."""

import glob
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful

import dct_compile
from dct_compile.state.entry import fold_share
from tests.rank_pool import Ranks
from tests.ranks import digest
from tests.ranks_balance import Balance, wrap
from tests.ranks_ddp import Net

pytestmark = pytest.mark.distributed

PAGE = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
SAVE_FILE, LOAD_FILE, LOAD_FILES, SAVE_DCP, LOAD_DCP, OWN_STATEFUL = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SAVES = {
    "files": SAVE_FILE,
    "dcp": SAVE_DCP,
    "async": SAVE_DCP.replace("dcp.save(state, checkpoint_id=folder)", "dcp.async_save(state, checkpoint_id=folder).result()"),
    "own": f"{OWN_STATEFUL}\ndcp.save({{'training': Training()}}, checkpoint_id=folder)",
}
OWN_LOAD = f"{OWN_STATEFUL}\ndcp.load({{'training': Training()}}, checkpoint_id=folder, planner=dct_compile.LoadPlanner())"
LOADS = {"files": LOAD_FILES, "dcp": LOAD_DCP, "async": LOAD_DCP, "own": OWN_LOAD}
PLAIN_LOADS = {
    "files": LOAD_FILE,
    "dcp": LOAD_DCP.replace(", planner=dct_compile.LoadPlanner()", ""),
    "own": OWN_LOAD.replace(", planner=dct_compile.LoadPlanner()", ""),
}
SCHEMES = ["gather", "owner", "powersgd", "random_k"]


def options(scheme: str) -> dict[str, Any]:
    return {"gradient_scheme": scheme, "dp_density": 0.05, "dp_value_dtype": "float32"}


def run(code: str, model: torch.nn.Module, folder: Path) -> None:
    """Runs code of the page, where ``model`` and ``folder`` are known."""
    names = {"dct_compile": dct_compile, "torch": torch, "dcp": dcp, "glob": glob, "Stateful": Stateful}
    exec(code, names | {"model": model, "folder": str(folder), "rank": dist.get_rank()})


def waiting(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What waits for each parameter: the mean over the ranks, since it is owed to a mean of gradients."""
    state = dct_compile.state_dict(model)
    found = {name: fold_share(state[name])["residual"].double() for name in sorted(state)}
    for residual in found.values():
        dist.all_reduce(residual)
        residual /= dist.get_world_size()
    return found


def of_this_rank(model: torch.nn.Module) -> str:
    state = dct_compile.state_dict(model)
    stages = [stage for name in sorted(state) for stage in (state[name], state[name].get("owner", {}))]
    return digest([value for stage in stages for _, value in sorted(stage.items()) if isinstance(value, torch.Tensor)])


def saved(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Trains and saves under each scheme; returns what waits, and a digest of this rank's state."""
    found = {}
    for scheme in SCHEMES:
        model = wrap(Net(), options(scheme))
        Balance(model.module).train(model, rank, range(3))
        for way, code in SAVES.items():
            place = folder / scheme / way
            place.mkdir(parents=True, exist_ok=True)
            run(code, model, place)
        found[scheme] = waiting(model), of_this_rank(model)
    return found


def loaded(rank: int, world_size: int, folder: Path, codes: dict[str, str], used: bool) -> dict[tuple[str, str], Any]:
    """Loads each of the states into a model that has trained a step or none, and trains on."""
    found = {}
    for scheme in SCHEMES:
        for way, code in codes.items():
            model = wrap(Net(), options(scheme))
            balance = Balance(model.module)
            if used:
                balance.train(model, rank, range(1))
            run(code, model, folder / scheme / way)
            before, own = waiting(model), of_this_rank(model)
            found[scheme, way] = before, own, balance.train(model, rank, range(3, 6))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (2, 4)}


@pytest.fixture(scope="module")
def by2(ranks2_once: Ranks, folders: dict[int, Path]) -> list[Any]:
    return ranks2_once(saved, folders[2])


@pytest.fixture(scope="module")
def by4(ranks4: Ranks, folders: dict[int, Path]) -> list[Any]:
    return ranks4(saved, folders[4])


def assert_nothing_is_lost(states: list[Any], results: list[Any]) -> None:
    for (scheme, way), (held, _, _) in results[0].items():
        expected = states[0][scheme][0]
        assert held.keys() == expected.keys(), (scheme, way)
        for name, residual in held.items():
            assert residual.any(), (scheme, way, name)
            torch.testing.assert_close(residual, expected[name], rtol=0, atol=1e-6, msg=f"{scheme} {way} {name}")


def assert_ranks_stay_equal(results: list[Any]) -> None:
    for key, (_, _, digests) in results[0].items():
        assert all(result[key][2] == digests for result in results), key


@pytest.mark.parametrize("used", [False, True], ids=["before the first step", "in use"])
def test_each_of_as_many_ranks_finds_its_own_state(by2: list[Any], ranks2: Ranks, folders: dict[int, Path], used: bool) -> None:
    for own, result in zip(by2, ranks2(loaded, folders[2], PLAIN_LOADS, used), strict=True):
        for (scheme, way), (_, found, _) in result.items():
            assert found == own[scheme][1], (scheme, way)


def test_the_planner_gives_as_many_ranks_their_own_state(by2: list[Any], ranks2: Ranks, folders: dict[int, Path]) -> None:
    for own, result in zip(by2, ranks2(loaded, folders[2], LOADS, True), strict=True):
        for (scheme, way), (_, found, _) in result.items():
            assert found == own[scheme][1], (scheme, way)


def test_fewer_ranks_keep_the_mean(by4: list[Any], ranks2: Ranks, folders: dict[int, Path]) -> None:
    results = ranks2(loaded, folders[4], LOADS, False)
    assert_nothing_is_lost(by4, results)
    assert_ranks_stay_equal(results)


def test_more_ranks_keep_the_mean(by2: list[Any], ranks3: Ranks, folders: dict[int, Path]) -> None:
    results = ranks3(loaded, folders[2], LOADS, True)
    assert_nothing_is_lost(by2, results)
    assert_ranks_stay_equal(results)


def refused(rank: int, world_size: int, folder: Path, ways: list[str]) -> list[str]:
    """Loads without a list and without the planner; returns the errors, and changes nothing."""
    errors = []
    model = wrap(Net(), options("gather"))
    Balance(model.module).train(model, rank, range(1))
    before = of_this_rank(model)
    for way in ways:
        try:
            run(PLAIN_LOADS[way], model, folder / "gather" / way)
        except (ValueError, CheckpointException) as error:  # the latter is no Exception
            errors.append(str(error))
        assert of_this_rank(model) == before
    return errors


def test_fewer_ranks_without_the_other_states_is_an_error(by4: list[Any], ranks2: Ranks, folders: dict[int, Path]) -> None:
    for rank, errors in enumerate(ranks2(refused, folders[4], list(PLAIN_LOADS))):
        expected = f"rank {rank} of 2 takes over the states of ranks {rank} and {rank + 2} of 4; not given: rank {rank + 2}."
        assert [error.startswith(expected) for error in errors] == [True] * 3, errors


def test_more_ranks_without_the_planner_is_an_error(by2: list[Any], ranks3: Ranks, folders: dict[int, Path]) -> None:
    for errors in ranks3(refused, folders[2], ["dcp", "own"]):
        assert len(errors) == 2
        assert "Missing key in checkpoint state_dict: dct.rank2" in errors[0]
        assert "Missing key in checkpoint state_dict: training.dct.rank2" in errors[1]
