"""``dct tune``: what it refuses, how a study goes on, and what is best."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dct_compile import tuning
from dct_compile.cli import extras, tune_trial
from dct_compile.cli.main import main
from dct_compile.cli.tune import step_seconds
from dct_compile.cli.tune_plots import draw
from dct_compile.cli.tune_search import Goal, OptunaStudy, Tried, front
from dct_compile.cli.tune_space import Choice, Range, Space, defaults, parse_space, space_for
from dct_compile.cli.tune_trial import Trainable, TrialError
from dct_compile.config import DCTConfig
from dct_compile.inspection import explain, fake_ranks
from dct_compile.link import Link
from dct_compile.options import DENSE
from dct_compile.tuning import Measured
from tests.processes import run_python

DENSE_RUN = Measured(1.0, 0.1, 1e6, 2, ("gradient",))
SPACE: Space = {"dp_density": Range(0.001, 0.1), "dp_value_dtype": Choice(("bfloat16", "int8"))}
NET = "def train(options): pass\n"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["tune", *map(str, arguments)], prog_name="dct")


def said(result: Result) -> str:
    return " ".join(result.output.split())


def tried(seconds: float, loss: float) -> Tried:
    return Tried({}, Measured(loss, seconds, 0, 0, ()), seconds)


def run(options: Mapping[str, Any], name: str) -> Measured:
    """A training whose loss and time follow from the density; one value always fails."""
    if options["dp_value_dtype"] == "int8":
        raise TrialError("no luck")
    return Measured(1.0 + 0.0001 / options["dp_density"], options["dp_density"], 10, 1, ("gradient",))


def goal() -> Goal:
    return Goal(1.01, lambda measured: measured.step_seconds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'TARGET'"),
        (
            ["gtp"],
            "unknown target 'gtp': expected a model (dlrm, gpt, resnet) or file.py:function, where the function takes a dict",
        ),
        (["nowhere.py:train"], "there is no file 'nowhere.py'"),
        (["net.py:train", "--steps", "3"], "--steps is for models of this project: a function of yours has its own"),
        (["dlrm", "--ranks", "3"], "dlrm has 2 model-parallel ranks: it needs --ranks 4"),
        (["gpt", "--ranks", "3"], "a batch of 16 cannot be shared equally by 3 x 1 ranks"),
        (["net.py:train", "--ranks", "1"], "1 is not in the range x>=2"),
        (["gpt", "--options", "data_parallel=true"], "option 'data_parallel' is for models without DDP"),
        (["net.py:train", "--within", "nan"], "nan is not a finite number"),
        (["net.py:train", "--timeout", "inf"], "inf is not a finite number"),
        (["net.py:train", "--link", "fast"], "--link 'fast' is neither a rate such as 1Gbit/s or 100Mbit/s nor none"),
        (["net.py:train", "--options", "link=auto"], "the link is said by --link, not by option link"),
        (["net.py:train", "--options", "dp_densty=1"], "unknown option 'dp_densty'"),
        (["net.py:train", "--search", "dp_density"], "--search 'dp_density' is not of the form option=low..high or option=value,value"),
        (["net.py:train", "--search", "dp_densty=1,2"], "there is no option 'dp_densty'; allowed are dp_density,"),
        (["net.py:train", "--search", "dp_density=0.1..0.01"], "a range needs two numbers above 0, the lower one first"),
        (["net.py:train", "--search", "dp_density=0.1..2"], "option 'dp_density' is 2.0 (float); allowed is a number in (0, 1]"),
        (["net.py:train", "--search", "arrival=now,soon"], "option 'arrival' is 'soon' (str); allowed is one of 'now', 'late'"),
        (["net.py:train", "--options", "rank=1", "--search", "rank=1,2"], "option 'rank' is given twice"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in said(result)


@pytest.mark.parametrize(("by", "missing"), [("optuna", "optuna"), ("ray", "ray")])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, by: str, missing: str) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == missing else True)
    result = invoke("gpt", "--by", by)
    assert result.exit_code == 1
    assert f"{missing} not installed: pip install" in said(result)


def test_help_does_not_import_torch() -> None:
    run_python(
        "import sys; from dct_compile.cli.main import main; main(['tune', '-h'], standalone_mode=False); assert 'torch' not in sys.modules"
    )


def test_space_follows_the_collectives() -> None:
    assert set(space_for(("gradient", "embedding"), {})) == {"dp_density", "dp_value_dtype", "embedding_codec"}
    assert set(space_for(("gradient",), {"dp_density": 0.1})) == {"dp_value_dtype"}
    assert space_for(("buffers",), {}) == {}


def test_every_value_that_is_searched_by_default_is_allowed() -> None:
    for kind in ("gradient", "activation", "embedding", "parameter", "sharded_gradient"):
        for name, values in space_for((kind,), {}).items():
            assert [DCTConfig(**{name: value}) for value in values.ends()]


def test_search_is_read() -> None:
    found = parse_space(["dp_density=0.001..0.1", "mp_eval=true,false", "arrival=now,late"], {})
    assert found == {"dp_density": Range(0.001, 0.1), "mp_eval": Choice((True, False)), "arrival": Choice(("now", "late"))}
    assert defaults(found) == {"dp_density": 0.01, "mp_eval": True, "arrival": "now"}
    assert defaults({"dp_density": Range(0.05, 0.1)}) == {}


def test_dense_options_leave_everything_dense() -> None:
    from dct_compile.cli.targets import dlrm

    with fake_ranks(4):
        target = dlrm()
        report = explain(target.model, *target.inputs, options={**DENSE, "link": None})
    assert {site.kind for site in report.sites} >= {"gradient", "activation", "embedding"}
    assert {site.decision for site in report.sites} == {"dense"}


def test_the_assumed_link_adds_its_seconds() -> None:
    measured = Measured(1.0, 0.1, 1e6, 4, ())
    assert step_seconds(None, measured) == 0.1
    assert step_seconds(Link(1e7, 0.001), measured) == pytest.approx(0.1 + 0.1 + 0.004)


def test_front_and_best() -> None:
    dense, slow, fast, bad = tried(1.0, 1.0), tried(0.9, 1.005), tried(0.5, 1.009), tried(0.1, 1.5)
    worse = tried(0.95, 1.2)
    assert front([dense, slow, fast, bad, worse]) == [bad, fast, slow, dense]
    assert goal().best([dense, slow, fast, bad, worse]) is fast
    assert goal().best([bad]) is None


def test_picture_is_a_png() -> None:
    assert draw("gpt", tried(1.0, 1.0), [tried(0.5, 1.005), tried(0.1, 2.0)], goal())[:4] == b"\x89PNG"


def test_a_study_goes_on_where_it_ended(tmp_path: Path) -> None:
    told: list[tuple[int, Any]] = []

    def tell(number: int, options: Mapping[str, Any], outcome: Measured | str) -> None:
        told.append((number, outcome))

    def search(trials: int) -> list[Tried]:
        study = OptunaStudy(tmp_path / "study.db", "a", seed=0)
        assert study.dense(lambda: DENSE_RUN if not told else pytest.fail("dense is trained again")) == DENSE_RUN
        return study.search(SPACE, run, goal(), trials, tell)

    first = search(6)
    assert first[0].options == {"dp_density": 0.01, "dp_value_dtype": "bfloat16"}, "the defaults come first"
    assert [number for number, _ in told] == list(range(6))
    second = search(9)
    assert [number for number, _ in told] == list(range(9))
    assert second[: len(first)] == first
    failed = [outcome for _, outcome in told if isinstance(outcome, str)]
    assert set(failed) == {"no luck"}
    assert len(second) == 9 - len(failed)
    assert len({trial.options["dp_density"] for trial in second}) == len(second), "the second run drew other options"
    assert search(9) == second
    assert len(told) == 9


def test_an_interrupted_trial_does_not_count(tmp_path: Path) -> None:
    def interrupted(options: Mapping[str, Any], name: str) -> Measured:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        OptunaStudy(tmp_path / "study.db", "a", 0).search(SPACE, interrupted, goal(), 1, lambda *_: None)
    space: Space = {"dp_density": SPACE["dp_density"]}
    found = OptunaStudy(tmp_path / "study.db", "a", 0).search(
        space, lambda options, name: run({**options, "dp_value_dtype": "bfloat16"}, name), goal(), 2, lambda *_: None
    )
    assert found[0].options == {"dp_density": 0.01}, "it is made again"
    assert len(found) == 2


@pytest.mark.parametrize(
    ("reported", "message"),
    [
        (None, "rank 0 has ended without a call of dct_compile.tuning.report"),
        (Measured(float("nan"), 1.0, 0, 0, ()), "the loss is nan"),
        (Measured(float("inf"), 1.0, 0, 0, ()), "the loss is inf"),
    ],
)
def test_a_training_without_numbers_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reported: Measured | None, message: str
) -> None:
    (tmp_path / "result.json").write_text(json.dumps(asdict(DENSE_RUN)))  # of an earlier run

    def ranks(*_: Any) -> None:
        if reported is not None:
            (tmp_path / "result.json").write_text(json.dumps(asdict(reported)))

    monkeypatch.setattr(tune_trial, "run_ranks", ranks)
    with pytest.raises(TrialError, match=message):
        Trainable("gpt", 2, None, None).run({}, tmp_path)


def test_other_studies_share_the_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        study = OptunaStudy(tmp_path / "study.db", name, 0)
        assert study.dense(lambda name=name: Measured(1.0, 0.1, 0, 0, (name,))).kinds == (name,)


def test_report_outside_of_a_trial_only_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.RESULT, raising=False)
    assert tuning.report(1, 0.5, wire_bytes=7) == Measured(1.0, 0.5, 7.0, 0, ())


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_reported_seconds_are_checked(seconds: float) -> None:
    with pytest.raises(ValueError, match="allowed is a finite number above 0"):
        tuning.report(1.0, seconds)
