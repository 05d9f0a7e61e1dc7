"""``dct train``: what it refuses, and what it makes of the results of a run."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dct_compile.cli import extras
from dct_compile.cli.backends import parse_backends
from dct_compile.cli.main import main
from dct_compile.cli.parsing import parse_options, parse_value
from dct_compile.cli.present import present
from dct_compile.cli.results import BackendResult, Results, Run, bytes_until
from dct_compile.cli.settings import optimization_of, parse_rates
from dct_compile.cli.tables import link, quality, sent, sites, traffic
from dct_compile.models.recipes import RECIPES
from dct_compile.models.tasks import TASKS
from dct_compile.report import SiteReport

SITE = SiteReport("all_reduce", "gradient", "top.weight", (1000,), "torch.float32", "compressed", "gather", 4000, 40, "dp", 2, 0.01, 3)
SMALL = ["--dataset", "synthetic", "--epochs", "1", "--batch-size", "512"]


def _invoke(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)], env=env)


def _results(seeds: int = 2, with_dct: bool = True) -> Results:
    runs = [
        Run(seed, {"log_loss": 0.5, "auc": 0.75 + seed / 100}, 3, [0.1, 0.3], [0.7, 0.6, 0.5], [(2, 0.02), (3, 0.03)], 1)
        for seed in range(seeds)
    ]
    ranks: list[list[dict[str, Any]]] = [
        [vars(SITE), {**vars(SITE), "kind": "embedding", "decision": "dense", "wire_bytes": 4000, "density": None, "overflow": None}],
        [{**vars(SITE), "wire_bytes": 60}],
    ]
    backends = [BackendResult("dense", runs, [[], []], [])]
    if with_dct:
        backends.append(BackendResult("dct", runs, ranks, ["a note"]))
    settings = {
        "model": "dlrm",
        "dataset": "synthetic",
        "backends": ["dense", "dct"],
        "seeds": seeds,
        "lr": 0.02,
        "rates": {"dct": 0.03},
        "dp": 2,
        "mp": 1,
        "criteo_path": None,
        "options": {"link": "1Gbit/s"},
    }
    environment = {"torch": "2", "python": "3", "machine": "m", "processor": "p <x>", "cores": 2, "link": "one machine"}
    return Results(settings, environment, list(TASKS["dlrm"].metrics), backends)


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
    own = optimization_of("gpt", None, None, None, None, None)
    assert own == RECIPES["gpt"].optimization
    assert (own.optimizer, own.betas, own.weight_decay, own.cosine, own.warmup) == ("adamw", (0.9, 0.95), 0.01, True, 50)
    changed = optimization_of("dlrm", "adam", None, None, None, 0.99)
    assert (changed.optimizer, changed.lr, changed.betas) == ("adam", RECIPES["dlrm"].rates["adam"], (0.9, 0.99))
    assert optimization_of("resnet", None, 0.3, 0.5, None, None).momentum == 0.5
    assert [optimization_of("dlrm", None, None, None, None, None, warmup).warmup for warmup in (None, 0, 7)] == [50, 0, 7]


def test_bytes_add_up_over_a_change() -> None:
    assert bytes_until([(1, 100.0), (3, 10.0)], 4) == [100, 200, 210, 220]


def test_bytes_sent_by_each_backend() -> None:
    results = _results()
    results.backends.append(BackendResult("powersgd-1", results.backends[0].runs, [[], []], [], [(1, 6000.0), (3, 600.0), (11, 1.0)]))
    table = sent(results)
    assert table is not None
    assert table.rows == [
        ["dense", "6,000", "1.0x", "0.02", "counted by dct"],
        ["dct", "2,050", "2.9x", "0.01", "counted by dct"],
        ["powersgd-1", "600 from step 3 on", "10.0x", "0.01", "computed from shapes"],
    ]
    assert sent(_results(with_dct=False)) is None


def test_every_backend_is_compared_with_dense_by_seed() -> None:
    results = _results()
    better = [replace(run, metrics={"log_loss": 0.4 - run.seed / 10, "auc": run.metrics["auc"] + 0.01}) for run in results.backends[0].runs]
    results.backends.append(BackendResult("fp16", better, [[], []], []))
    assert quality(results).rows[-1] == ["fp16 - dense", "", "-0.1500 ± 0.0707", "+0.0100 ± 0.0000", "", ""]
    assert quality(results).note.endswith("Better: lower test log-loss, higher test AUC.")


def test_means_spreads_and_bytes() -> None:
    dct = _results().get("dct")
    assert dct is not None
    assert dct.mean_and_spread("auc") == pytest.approx((0.755, 0.01 / 2**0.5))
    assert dct.mean_and_spread("steps_per_second")[0] == pytest.approx(5.0)
    assert dct.bytes_of("wire_bytes", ["gradient"]) == 50
    assert dct.bytes_of("dense_bytes", ["gradient", "embedding"]) == 6000
    single = _results(seeds=1).get("dct")
    assert single is not None
    assert single.mean_and_spread("auc") == (0.75, None)


def test_tables() -> None:
    results = _results()
    assert quality(results).rows[1] == ["dct", "0.03", "0.5000 ± 0.0000", "0.7550 ± 0.0071", "5.0 ± 0.0", "identical (2 checks)"]
    assert quality(results).rows[2] == ["dct - dense", "", "+0.0000 ± 0.0000", "+0.0000 ± 0.0000", "", ""]
    assert len(quality(_results(with_dct=False)).rows) == 1
    table = traffic(results)
    assert table is not None
    assert table.rows == [
        ["gradients", "4,000", "50", "80.0x"],
        ["activations", "0", "0", "-"],
        ["embeddings", "2,000", "2,000", "1.0x"],
        ["all", "6,000", "2,050", "2.9x"],
    ]
    table = sites(results)
    assert table is not None
    assert [row[5:10] for row in table.rows] == [["4,000", "40", "100.0x", "0.0100", "3"], ["4,000", "4,000", "1.0x", "-", "-"]]
    table = link(results)
    assert table is not None
    assert table.rows == [["1 Gbit/s, 50 us", "-", "-", "-"]], "no site knows its seconds"
    results.backends[1].sites[0] = [{**vars(SITE), "calls": 2, "seconds": 0.001, "dense_seconds": 0.02}, vars(SITE)]
    table = link(results)
    assert table is not None
    assert table.rows == [["1 Gbit/s, 50 us", "40 ms", "2 ms", "20.0x"]]
    assert table.note.endswith("The link here: one machine.")
    assert traffic(_results(with_dct=False)) is None
    assert link(_results(with_dct=False)) is None
    assert sites(_results(with_dct=False)) is None


@pytest.mark.parametrize("with_dct", [True, False])
def test_report_is_one_self_contained_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], with_dct: bool) -> None:
    results = _results(with_dct=with_dct)
    results.save(tmp_path)
    assert quality(Results.read(tmp_path)) == quality(results)
    present(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    plots = {"loss.png", "loss-over-bytes.png", "bytes.png", "density.png"} if with_dct else {"loss.png"}
    assert names == {"metrics.json", "report.html", *plots}
    page = (tmp_path / "report.html").read_text()
    assert set(re.findall(r'(?:src|srcset|href)="([^,"]*)', page)) == {"data:image/png;base64"}
    assert page.count("<img ") == len(plots)
    assert "p &lt;x&gt;" in page
    assert ("a note" in page) is with_dct
    assert ("80.0x" in capsys.readouterr().out) is with_dct
