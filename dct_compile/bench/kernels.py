"""Measures the ops of ``torch.ops.dct``: each checked against its reference first, then timed in turns with its baselines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch.utils._pytree import tree_leaves

from dct_compile.bench.cases import CASES, Case
from dct_compile.bench.inputs import Inputs, Problem, Source
from dct_compile.bench.machine import available_bytes
from dct_compile.bench.timing import Contender, Stopwatch, Timing, interleaved

OP, ADD, COPY = "dct", "add", "copy"
"""Names among the timings of a measurement: the op itself, ``torch.add(a, b, out=c)`` (float32, as many elements), ``dst.copy_(src)``."""
COPY_CACHES = 8
"""Last-level caches that fit into each of the tensors of the copy."""
LARGEST_CHECK = 2**22
"""The references are slow: larger problems are checked at this many elements, with everything else as it is."""
SCALE_NUMEL = 2**16
"""The memory of a large problem's inputs is told from that of this many elements."""
TEMPORARY_BYTES = 48
"""Memory per element besides inputs: of the hungriest baseline (a sort with its int64 indices) and of the random numbers."""
ADD_BYTES = 12
"""Bytes per element of the three tensors of ``torch.add``."""


class MismatchError(Exception):
    """An op and its reference differ."""


@dataclass(frozen=True)
class Measurement:
    """A case at one size: ``timings`` of ``OP``, ``ADD``, ``COPY`` and the baselines. Without any it was not run; ``status`` says why.

    ``checked_numel``: the number of elements at which the op was compared with its reference. ``copy_bytes``: read and written by the
    copy. Both are 0 if it was not run.
    """

    case: Case
    problem: Problem
    status: str = "ok"
    timings: dict[str, Timing] = field(default_factory=dict)
    checked_numel: int = 0
    copy_bytes: int = 0

    @property
    def bytes_per_s(self) -> float:
        """The floor of the traffic over the median time."""
        return self.case.floor_bytes(self.problem) / (self.timings[OP].median_ms / 1e3)

    @property
    def copy_bytes_per_s(self) -> float:
        """The bandwidth of the copy."""
        return self.copy_bytes / (self.timings[COPY].median_ms / 1e3)

    @property
    def percent_of_copy(self) -> float:
        """``bytes_per_s`` in percent of ``copy_bytes_per_s``."""
        return 100 * self.bytes_per_s / self.copy_bytes_per_s

    @property
    def vs_add(self) -> float:
        """The op's median time over that of ``torch.add(a, b, out=c)``."""
        return self.timings[OP].median_ms / self.timings[ADD].median_ms

    def speedup(self, name: str) -> float | None:
        """Returns the median time of ``name`` over that of the op. None where that was not measured."""
        return self.timings[name].median_ms / self.timings[OP].median_ms if name in self.timings else None


@dataclass(frozen=True)
class Settings:
    """The choice of measurements. ``widths``: how many row widths of each op, or None for all; ``seconds``, ``inductor``: see ``Bench``."""

    device: torch.device
    ops: tuple[str, ...]
    sizes: tuple[int, ...]
    densities: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    widths: int | None
    seconds: float
    inductor: bool


def plan(settings: Settings) -> list[tuple[Case, Problem]]:
    """Returns the measurements to make, size by size, so that the random numbers of a size are made once."""
    return [
        (case, Problem(numel, width, density, dtype, settings.device))
        for numel in settings.sizes
        for dtype in settings.dtypes
        for case in CASES
        if case.op_name in settings.ops
        for width in case.widths[: settings.widths] or (numel,)
        for density in (settings.densities if case.has_density else (1.0,))
    ]


class Bench:
    """Measures case after case on one device; ``seconds``: for each contender of a measurement; ``inductor``: as a baseline, too."""

    def __init__(self, stopwatch: Stopwatch, seconds: float, inductor: bool) -> None:
        self._stopwatch, self._seconds, self._inductor = stopwatch, seconds, inductor
        self._addends: list[Tensor] = []
        self._source, self._small_source, self._check_source = Source(), Source(), Source()
        self._copy_source = torch.ones(COPY_CACHES * stopwatch.cache_bytes, dtype=torch.uint8, device=stopwatch.device)
        self._copied = torch.ones_like(self._copy_source)
        self._checked: set[tuple[str, str, Problem]] = set()
        self._numel = self._available = 0

    def measure(self, case: Case, problem: Problem) -> Measurement:
        """Checks and times one case. Raises ``MismatchError`` where op and reference differ."""
        copies = self._stopwatch.copies(self._input_bytes(case, problem))
        if problem.numel != self._numel:  # only then: what is given back for a look at the rest is slow memory when it returns
            self._numel, self._available = problem.numel, available_bytes(problem.device) + self._held_bytes()
        needed = self._needed_bytes(case, problem, copies)
        if needed > self._available:
            return Measurement(case, problem, f"does not fit: needs {needed / 2**30:.1f} GiB, {self._available / 2**30:.1f} GiB are free")
        small = problem.at_most(LARGEST_CHECK)
        key = (case.op_name, case.variant, small)
        if key not in self._checked:
            check(case, small, self._check_source)
            self._checked.add(key)
        contenders = _contenders(case, case.make(problem, self._source), copies, self._inductor)
        contenders[ADD] = self._add(problem)
        contenders[COPY] = Contender(lambda _: self._copied.copy_(self._copy_source), 1)
        timings = interleaved(contenders, self._stopwatch, self._seconds)
        return Measurement(case, problem, timings=timings, checked_numel=small.numel, copy_bytes=2 * self._copied.nbytes)

    def _add(self, problem: Problem) -> Contender:
        copies = self._stopwatch.copies(ADD_BYTES * problem.numel)
        if not self._addends or self._addends[0].shape[1] != problem.numel:
            self._addends = []  # before the new ones are made
            self._addends = [torch.ones(3, problem.numel, device=problem.device) for _ in range(copies)]
        sets = [tuple(addends) for addends in self._addends]
        return Contender(lambda turn: torch.add(sets[turn][0], sets[turn][1], out=sets[turn][2]), copies)

    def _input_bytes(self, case: Case, problem: Problem) -> int:
        small = problem.at_most(SCALE_NUMEL)
        tensors = case.make(small, self._small_source).tensors()
        return sum(tensor.nbytes for tensor in tensors) * problem.numel // small.numel

    def _held_bytes(self) -> int:
        """Returns the bytes that are kept from one measurement to the next, and counted by ``_needed_bytes`` again."""
        return self._source.nbytes + sum(tensor.nbytes for tensor in self._addends)

    def _needed_bytes(self, case: Case, problem: Problem, copies: int) -> int:
        inputs = self._input_bytes(case, problem) * (copies + 1)
        adds = ADD_BYTES * problem.numel * self._stopwatch.copies(ADD_BYTES * problem.numel)
        return inputs + adds + TEMPORARY_BYTES * problem.numel


def check(case: Case, problem: Problem, source: Source) -> None:
    """Compares the result of an op and every tensor that it was given with those of its reference, to the byte.

    Raises ``MismatchError`` that names op, variant, size, dtype and density.
    """
    made = case.make(problem, source)
    actual, expected = made.clone().arguments, made.clone().arguments
    results = case.op(*actual), case.reference(*expected)
    for mine, theirs in zip(tree_leaves((results[0], actual)), tree_leaves((results[1], expected)), strict=True):
        if isinstance(theirs, Tensor) and not _equal(mine, theirs, case.rtol):
            dtype = str(problem.dtype).removeprefix("torch.")
            sizes = f"{problem.numel} elements in rows of {problem.width}, density {problem.density:g}, {dtype}"
            raise MismatchError(f"{case.op_name} ({case.variant}) differs from its reference: {sizes}")


def _equal(actual: Tensor, expected: Tensor, rtol: float) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if rtol and expected.is_floating_point():
        return torch.allclose(actual, expected, rtol=rtol, atol=0)
    return torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def _contenders(case: Case, made: Inputs, copies: int, inductor: bool) -> dict[str, Contender]:
    """Returns the op and its baselines on the same ``copies`` of the inputs.

    ``made`` stays as it is: the op's changes are undone from it.
    """
    sets = [made.clone() for _ in range(copies)]
    mutated = [
        i for i, argument in enumerate(case.op._schema.arguments) if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def run_op(turn: int) -> object:
        return case.op(*sets[turn].arguments)

    def restore(turn: int) -> None:
        for i in mutated:
            for held, original in zip(tree_leaves(sets[turn].arguments[i]), tree_leaves(made.arguments[i]), strict=True):
                held.copy_(original)

    def baseline(chain: Callable[..., object]) -> Contender:
        return Contender(lambda turn: chain(*sets[turn].operands), copies)

    run_op(0)  # compiles, where the kernels are compiled for each size
    restore(0)
    chains = dict(case.baselines)
    if inductor and "eager" in chains:
        chains["inductor"] = _compiled(chains["eager"], made.operands)
    return {OP: Contender(run_op, copies, restore), **{name: baseline(chain) for name, chain in chains.items()}}


def _compiled(chain: Callable[..., object], operands: tuple[Any, ...]) -> Callable[..., object]:
    """Returns the chain compiled by Inductor for exactly these sizes, as one graph."""
    torch._dynamo.reset()  # or the sizes before would make this one dynamic
    with dynamo_config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(chain, fullgraph=True, dynamic=False)
        compiled(*operands)
    return compiled
