"""Checkpoints: another number of ranks, and files that are damaged or foreign."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import dct_compile
from dct_compile.state.entry import fold_share
from faults.ranks import Rank, results, run, run_each
from faults.row import Row, check
from faults.training import Training

SCHEMES = ("gather", "owner")


def _options(scheme: str) -> dict[str, Any]:
    return {"gradient_scheme": scheme, "dp_value_dtype": "float32"}


def _waiting(training: Training) -> dict[str, float]:
    """Returns the mean over the ranks of what waits for each parameter: it is owed to a mean of gradients."""
    state = dct_compile.state_dict(training.model)
    found = {}
    for name in sorted(state):
        residual = fold_share(state[name])["residual"].double()
        dist.all_reduce(residual)
        found[name] = (residual * torch.arange(1, residual.numel() + 1)).sum().item() / dist.get_world_size()
    return found


def saved(rank: Rank, way: str, scheme: str, folder: Path) -> dict[str, float]:
    training = Training(way, _options(scheme))
    training.steps(rank.number, range(4))
    state = dct_compile.state_dict(training.model)
    torch.save(state, folder / f"dct-{rank.number}.pt")
    save({"model": training.model.state_dict(), "dct": state}, checkpoint_id=folder / "dcp")
    return _waiting(training)


def loaded(rank: Rank, way: str, scheme: str, folder: Path, how: str) -> tuple[dict[str, float], bool]:
    """Loads, and trains on. Returns what waited after loading, and whether the parameters are finite in the end."""
    training = Training(way, _options(scheme))
    if how == "dcp":
        state = {"model": training.model.state_dict(), "dct": dct_compile.state_dict(training.model)}
        load(state, checkpoint_id=folder / "dcp", planner=dct_compile.LoadPlanner())
        training.model.load_state_dict(state["model"])
        dct_compile.load_state_dict(training.model, state["dct"])
    else:
        dct_compile.load_state_dict(training.model, [torch.load(file) for file in sorted(folder.glob("dct-*.pt"))])
    waiting = _waiting(training)
    training.steps(rank.number, range(4, 7))
    return waiting, all(bool(parameter.isfinite().all()) for parameter in training.model.parameters())


def other_ranks(folder: Path) -> str:
    ways = [(way, scheme) for way in ("compile(DDP)", "data_parallel") for scheme in SCHEMES]
    for before, after in ((2, 3), (3, 2)):
        places = [folder / f"{before}-{number}" for number in range(len(ways))]
        for place in places:
            place.mkdir()
        cases = [(way, scheme, place) for (way, scheme), place in zip(ways, places, strict=True)]
        expected = [found[0] for found in run_each(before, saved, cases)]
        for how in ("files", "dcp"):
            for case, sums, ends in zip(cases, expected, run_each(after, loaded, [(*case, how) for case in cases]), strict=True):
                for waiting, finite in ends:
                    same = finite and _close(sums, waiting)
                    check(same, f"{case[:2]}, {how}, {before} -> {after}: {sums} became {waiting}")
    return f"so in {4 * len(ways)} of {4 * len(ways)} cases"


def _close(expected: dict[str, float], got: dict[str, float]) -> bool:
    return expected.keys() == got.keys() and all(abs(got[name] - value) <= 1e-5 * max(1.0, abs(value)) for name, value in expected.items())


def _cut(file: Path, state: dict[str, Any]) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 2 // 3])


def _of_another_model(file: Path, state: dict[str, Any]) -> None:
    torch.save({f"other.{name}": entry for name, entry in state.items()}, file)


def _of_other_sizes(file: Path, state: dict[str, Any]) -> None:
    torch.save({name: {**entry, "residual": entry["residual"][:-1]} for name, entry in state.items()}, file)


def _of_the_model(file: Path, state: dict[str, Any]) -> None:
    torch.save({"bottom.weight": torch.zeros(64, 16)}, file)


def _with_nan(file: Path, state: dict[str, Any]) -> None:
    torch.save({name: {**entry, "residual": entry["residual"] * float("nan")} for name, entry in state.items()}, file)


DAMAGES: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "truncated": _cut,
    "of another model": _of_another_model,
    "of other sizes": _of_other_sizes,
    "the model's own state_dict": _of_the_model,
    "with NaN": _with_nan,
}


def refused(rank: Rank, folder: Path) -> dict[str, tuple[str, bool]]:
    """Loads each damaged file. Returns the error, and whether the state is as before."""
    training = Training("compile(DDP)")
    training.steps(rank.number, range(3))
    found = {}
    for name, damage in DAMAGES.items():
        state = dct_compile.state_dict(training.model)
        file = folder / f"{name}-{rank.number}.pt"
        torch.save(state, file)
        damage(file, dict(state))
        try:
            dct_compile.load_state_dict(training.model, torch.load(file))
            error = ""
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        after = dct_compile.state_dict(training.model)
        same = all(torch.equal(entry["residual"], after[key]["residual"]) for key, entry in state.items())
        found[name] = error, same
    training.steps(rank.number, range(3, 5))
    return found


def damaged(folder: Path) -> str:
    for found in results(run(2, refused, folder)):
        for name, (error, same) in found.items():
            check(bool(error) and same, f"{name}: {error or 'no error'}; the state is {'unchanged' if same else 'changed'}")
    return f"so for {len(DAMAGES)} of {len(DAMAGES)} files; then the training goes on"


ROWS = (
    Row(
        "N -> M checkpoints",
        "files and torch.distributed.checkpoint, 2 -> 3 and 3 -> 2 ranks; compile(DDP) and data_parallel, gather and owner",
        "the mean of what waits is the same, and the training goes on",
        3,
        other_ranks,
    ),
    Row("damaged or foreign state files", ", ".join(DAMAGES), "an error, and the state is as before", 2, damaged),
)
