"""``dct train``: what it refuses, and how it reads its arguments."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dct_compile.cli import extras
from dct_compile.cli.backends import parse_backends
from dct_compile.cli.main import main
from dct_compile.cli.parsing import parse_options, parse_value
from dct_compile.cli.settings import optimization_of, parse_rates
from dct_compile.models.recipes import RECIPES

SMALL = ["--dataset", "synthetic", "--epochs", "1", "--batch-size", "512"]


def _invoke(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)], env=env)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "movie"], "'movie' is not one of 'movielens', 'flights', 'criteo', 'synthetic'"),
        (["--dp", "0"], "--dp"),
        (["--lr", "0"], "--lr '0' is not of the form rate or backend=rate, with a rate above 0 and one of dense, dct, fp16"),
        (["--lr", "dcd=0.1"], "--lr 'dcd=0.1' is not of the form rate or backend=rate"),
        (["--lr", "dct=nan"], "--lr 'dct=nan' is not of the form"),
        (["--lr", "dct=0.1", "--lr", "dct=0.2"], "--lr is given twice for dct"),
        ([*SMALL, "--batch-size", "130"], "a batch of 130 cannot be shared equally by 2 x 2 ranks"),
        ([*SMALL, "--batch-size", "4000"], "larger than the training part of synthetic (3277 samples)"),
        ([*SMALL, "--dp", "1", "--mp", "4"], "4 model-parallel ranks are more than the 3 tables"),
        ([*SMALL, "--dp-density", "2"], "option 'dp_density' is 2.0"),
        ([*SMALL, "--embedding-codec", "int9"], "did you mean"),
        ([*SMALL, "--threshold", "exakt"], "option 'threshold' is 'exakt'"),
        ([*SMALL, "--option", "mp_densty=0.1"], "unknown option 'mp_densty'"),
        ([*SMALL, "--option", "mp_density"], "'mp_density' is not of the form key=value"),
        ([*SMALL, "--option", "min_numel=1", "--option", "min_numel=2"], "'min_numel' is given twice"),
        ([*SMALL, "--mp-density", "0.1", "--option", "mp_density=0.2"], "mp_density given both as a flag and as an --option"),
        ([*SMALL, "--option", "data_parallel=true"], "option 'data_parallel' is for models without DDP: the trainings of this command"),
        (["--dataset", "criteo"], "needs the path of its train.txt"),
        (["--dataset", "criteo", "--criteo-path", "no-such-file"], "no-such-file does not exist: get the Criteo Kaggle data set"),
        (["--model", "gpt", "--dataset", "movielens"], "gpt is not trained on movielens: its data sets are shakespeare"),
        (["--model", "gpt", "--mp", "2"], "gpt is trained data parallel only: it needs --mp 1, not --mp 2"),
        (["--model", "resnet", "--mp", "2"], "resnet is trained data parallel only: it needs --mp 1, not --mp 2"),
        (["--model", "resnet", "--fashion-mnist-path", "no-such-folder"], "get the data with `apt-get install -y dataset-fashion-mnist`"),
        (["--model", "bert"], "'bert' is not one of 'dlrm', 'gpt', 'resnet'"),
        (["--optimizer", "lion"], "'lion' is not one of 'adagrad', 'adam', 'adamw', 'sgd'"),
        ([*SMALL, "--momentum", "0.5"], "--momentum is a number of sgd; the optimizer is adagrad"),
        (["--model", "resnet", "--beta2", "0.9"], "--beta2 is a number of adam and adamw; the optimizer is sgd"),
        ([*SMALL, "--backend", "dense,powersgd-3"], "'powersgd-3' is not one of 'dense', 'dct', 'fp16', 'powersgd-1', 'powersgd-2'"),
        (
            [*SMALL, "--backend", "fp16"],
            "fp16: torch's hooks average the gradients of data-parallel ranks and need --mp 1",
        ),
        ([*SMALL, "--dp", "1", "--mp", "1", "--backend", "powersgd-4"], "not --mp 1 and --dp 1"),
    ],
)
def test_bad_values_are_usage_errors(arguments: list[str], message: str) -> None:
    result = _invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", "").split())


def test_learning_rates_of_all_backends_and_of_one() -> None:
    assert parse_rates(["0.02", "dct=0.03"]) == (0.02, {"dct": 0.03})
    assert parse_rates([]) == (None, {})


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = _invoke(*SMALL, "--out", tmp_path / "file" / "below")
    assert result.exit_code == 2
    assert "cannot write to" in result.output


def test_a_folder_that_takes_no_file_is_an_error(tmp_path: Path) -> None:
    result = _invoke(*SMALL, "--out", "/proc")
    assert result.exit_code == 2
    assert "cannot write /proc/report.html: No such file or directory" in result.output


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "matplotlib" else True)
    result = _invoke(*SMALL)
    assert result.exit_code == 1
    assert "matplotlib not installed: pip install 'dct-compile[demo]'" in result.output


def test_another_number_of_torchrun_ranks_is_an_error(tmp_path: Path) -> None:
    result = _invoke(*SMALL, "--out", tmp_path, env={"RANK": "0", "WORLD_SIZE": "3"})
    assert result.exit_code == 1
    assert "torchrun started 3 ranks, --dp 2 --mp 2 needs 4" in result.output


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK is 'x' in the environment, which is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": None}, "there is no MASTER_ADDR in the environment"),
    ],
)
def test_what_torchrun_has_not_written_is_told(tmp_path: Path, environment: dict[str, str], words: str) -> None:
    result = _invoke(*SMALL, "--out", tmp_path, env=environment)
    assert result.exit_code == 2
    assert f"{words}: start the command with torchrun" in " ".join(result.output.split())


def test_option_values() -> None:
    values = {
        "1": 1,
        "0.5": 0.5,
        "true": True,
        "False": False,
        '["*.bias"]': ["*.bias"],
        "('a',)": ("a",),
        "None": None,
        "laplace": "laplace",
    }
    assert {text: parse_value(text) for text in values} == values
    assert parse_options(["a=1", "b =x=y"]) == {"a": 1, "b": "x=y"}


def test_backends_are_given_with_commas_or_repeatedly() -> None:
    assert parse_backends(("both",)) == ("dense", "dct")
    assert parse_backends(("dct, fp16", "powersgd-1", "both")) == ("dct", "fp16", "powersgd-1", "dense")


def test_an_optimization_is_the_models_own_but_for_what_is_given() -> None:
    own = optimization_of("gpt")
    assert own == RECIPES["gpt"].optimization
    assert (own.optimizer, own.betas, own.weight_decay, own.schedule, own.warmup) == ("adamw", (0.9, 0.95), 0.01, "cosine", 50)
    changed = optimization_of("dlrm", optimizer="adam", beta2=0.99)
    assert (changed.optimizer, changed.lr, changed.betas) == ("adam", RECIPES["dlrm"].rates["adam"], (0.9, 0.99))
    assert optimization_of("resnet", lr=0.3, momentum=0.5).momentum == 0.5
    assert [optimization_of("dlrm", warmup=warmup).warmup for warmup in (None, 0, 7)] == [50, 0, 7]
    assert optimization_of("gpt", schedule="constant").schedule == "constant"
