"""Numbers that ``dct train`` shows: while it trains, between two readings, and in the tables and the report of a run."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dct_compile.cli.present import present
from dct_compile.cli.results import BackendResult, Results, Run, bytes_until, gradient_density
from dct_compile.cli.tables import link, quality, sent, sites, traffic
from dct_compile.cli.worker import _postfix
from dct_compile.models.tasks import TASKS
from dct_compile.report import SiteReport

SITE = SiteReport("all_reduce", "gradient", "top.weight", (1000,), "torch.float32", "compressed", "gather", 4000, 40, "dp", 2, 0.01, 3)


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


def test_density_between_two_readings() -> None:
    run = Run(0, {}, 30, [1.0], [0.0], [(10, 0.05), (20, 0.03), (30, 0.02)], 1)
    assert [(step, round(density, 9)) for step, density in run.density_between()] == [(10, 0.05), (20, 0.01), (30, 0.0)]


def test_progress_shows_what_is_known() -> None:
    assert _postfix(torch.tensor(0.5), {}) == {"loss": "0.5000"}
    numbers = {"density": 0.01012, "overflow": 1200, "compression": 37.24}
    shown = {"loss": "0.5000", "density": "0.0101", "overflow": "1200", "compression": "37.2x"}
    assert _postfix(torch.tensor(0.5), numbers) == shown


def test_gradient_density_is_weighted_by_size() -> None:
    larger = SiteReport(**{**vars(SITE), "shape": (3000,), "density": 0.05})
    others = [SiteReport(**{**vars(SITE), "kind": "activation"}), SiteReport(**{**vars(SITE), "density": None})]
    assert gradient_density([SITE, larger, *others]) == pytest.approx(0.04)
    assert gradient_density(others) is None


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
