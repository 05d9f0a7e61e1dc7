"""Ranks that are not alike: options, caches, batches, graph breaks; and options at their limits."""

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import dct_compile
from dct_compile.triton_kernels.cpu.build import load_library
from faults.ranks import Rank, caches_in, run_each
from faults.row import Row, check
from faults.training import GRADIENTS, Training, batch

STEPS = 12


def error_of(rank: Rank, way: str, options: dict[str, Any], others: dict[str, Any]) -> str:
    try:
        Training(way, options if rank.number == 0 else others).steps(rank.number, range(2))
    except RuntimeError as error:
        return str(error)
    return "no error"


def other_options(folder: Path) -> str:
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        *[(way, {"dp_density": 0.05}, {"dp_density": 0.1}) for way in GRADIENTS],
        ("activations", {"activation_codec": "int8"}, {"activation_codec": "bfloat16"}),
        ("compile(DDP)", {"gradient_scheme": "gather"}, {"gradient_scheme": "owner"}),
    ]
    for (way, options, others), errors in zip(cases, run_each(2, error_of, cases), strict=True):
        (name,) = options
        for error in errors:
            for words in (f"option {name!r} is ", f"{options[name]!r} on rank 0", f"{others[name]!r} on rank 1"):
                check("would compress differently" in error and words in error, f"{way}: {error}")
    return f"so in {len(cases)} of {len(cases)} cases"


def audited(
    rank: Rank, way: str, options: dict[str, Any], unlike: str = "", environment: dict[str, str] | None = None
) -> tuple[str, float, int]:
    """Trains under an audit. Returns the digest of the parameters, the audit's error and the compressed parameters.

    ``unlike``: how rank 1 differs, with ``environment`` for it alone.
    """
    mine = rank.number == 1
    if mine and environment:
        os.environ.update(environment)
        tempfile.tempdir = None  # the folder is looked up anew
        check(load_library() is None, "the rank without a compiler has found kernels")
    training = Training(way, {**options, "audit": True}, broken=unlike == "breaks" and mine)
    with dct_compile.audit(training.model) as audit:
        for step in range(STEPS):
            rows = 12
            if unlike == "batches":
                rows = 3 + 5 * rank.number + step % 3
            elif unlike == "empty" and mine and step % 4 == 2:
                rows = 0
            training.loss(batch(rank.number, step, rows)).backward()
            training.apply()
        found = audit.check()
    return training.digest(), found.error, len(found.compressed)


def unlike(how: str, ways: tuple[str, ...], folder: Path) -> str:
    worst = 0.0
    found = run_each(2, audited, [(way, {}, how) for way in ways])
    for way, ((first, error, count), (second, _, _)) in zip(ways, found, strict=True):
        check(first == second, f"{way}: other parameters on each rank")
        check(count > 0, f"{way}: nothing was compressed")
        worst = max(worst, error)
    return f"so in {len(ways)} of {len(ways)} ways; the audit differs by {worst:.0e} of the gradients"


def other_caches(folder: Path) -> str:
    caches = {**caches_in(folder, folder / "kernels"), "CXX": "no-compiler"}
    both = [run_each(2, audited, [(way, {}, "", environment) for way in GRADIENTS]) for environment in ({}, caches)]
    for way, alike, other in zip(GRADIENTS, *both, strict=True):
        check(len({digest for digest, _, _ in [*alike, *other]}) == 1, f"{way}: other parameters")
    return f"so in {len(GRADIENTS)} of {len(GRADIENTS)} ways"


EXTREMES: tuple[dict[str, Any], ...] = (
    {"dp_density": 1e-6, "min_numel": 0},
    {"dp_density": 1.0},
    {"dp_density": 0.5, "min_numel": 0, "capacity_factor": 1.0},
    {"dp_density": 0.05, "min_numel": 10**9},
    {"dp_density": 0.05, "refresh_interval": 1, "hold_density": False},
    {"dp_density": 0.05, "threshold": 1e30},
    {"dp_density": 0.05, "dp_value_dtype": "int8", "gradient_scheme": "owner"},
)


def extremes(folder: Path) -> str:
    worst = 0.0
    cases = [(way, options) for options in EXTREMES for way in ("compile(DDP)", "data_parallel")]
    for (way, options), ((first, error, _), (second, _, _)) in zip(cases, run_each(2, audited, cases), strict=True):
        check(first == second, f"{way}, {options}: other parameters on each rank")
        worst = max(worst, error)
    return f"so for {len(EXTREMES)} of {len(EXTREMES)} sets of options; the audit differs by {worst:.0e} of the gradients"


_EXACT = "the audit is exact to rounding (nothing lost), and the parameters of both ranks are equal"
_TEXTS = ", ".join(" ".join(f"{name}={value}" for name, value in options.items()) for options in EXTREMES)
ROWS = (
    Row(
        "ranks with other options",
        "dp_density (all ways), gradient_scheme, activation_codec differ on one rank",
        "an error on both ranks before anything is sent; it names the option and both values",
        2,
        other_options,
    ),
    Row(
        "ranks with other caches",
        "one rank has empty caches and no C++ compiler, so it runs the reference kernels",
        "the parameters of ranks with equal caches, bit for bit",
        2,
        other_caches,
    ),
    Row(
        "ranks with other batch sizes",
        "3 to 10 rows, another number on each rank and step",
        _EXACT,
        2,
        partial(unlike, "batches", GRADIENTS),
    ),
    Row(
        "graph breaks on one rank",
        "the model of rank 1 has a graph break; compile(DDP), DDP(compile), arrival=late",
        _EXACT,
        2,
        partial(unlike, "breaks", tuple(way for way in GRADIENTS if way != "data_parallel")),
    ),
    Row("an empty batch on one rank", "0 rows on rank 1 in every fourth step", _EXACT, 2, partial(unlike, "empty", GRADIENTS)),
    Row("extreme options", _TEXTS, _EXACT, 2, extremes),
)
