"""The inputs of the ops and their baselines: sizes, random numbers, arguments."""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dct_compile import ops
from dct_compile.bench import baselines
from dct_compile.config import DCTConfig
from dct_compile.triton_kernels.layout import COUNTERS, GradientLayout, RowLayout, Selection, choose_block
from dct_compile.triton_kernels.moments import spread_shares
from dct_compile.triton_kernels.row_codec import decode_rows
from dct_compile.triton_kernels.select_threshold import sample_numel, sample_stride

CONFIG = DCTConfig()
"""Whatever is not varied has the backend's default."""
VALUE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Problem:
    """One set of sizes. ``width``: of a row; the ops on gradients see one row. ``density``: 1 for the ops that keep everything."""

    numel: int
    width: int
    density: float
    dtype: torch.dtype
    device: torch.device

    @property
    def rows(self) -> int:
        return self.numel // self.width

    @property
    def kept(self) -> int:
        """Entries kept of each row."""
        return ceil(self.density * self.width)

    def at_most(self, numel: int) -> "Problem":
        """Returns the same with ``numel`` elements, if it has more."""
        return replace(self, numel=min(self.numel, numel), width=min(self.width, numel))

    @property
    def layout(self) -> GradientLayout:
        """A bucket of one parameter, sent whole."""
        fraction = min(1.0, self.density * CONFIG.capacity_factor)
        return GradientLayout(((0, self.numel),), choose_block(self.density, self.numel), 1, -1, fraction, VALUE_DTYPE)

    def selection(self, method: str) -> Selection:
        """Due at step 0, and not at the next ones."""
        return Selection(self.density, method, 0.0, CONFIG.refresh_interval, "off")

    def row_layout(self, method: str = "exact") -> RowLayout:
        """Returns a row, with the capacity that the plan chooses for the method."""
        capacity = self.kept if method == "exact" else min(self.width, ceil(self.kept * CONFIG.capacity_factor))
        return RowLayout((self.width,), capacity, VALUE_DTYPE)


@dataclass(frozen=True)
class Inputs:
    """``arguments`` of the op, and ``operands`` of its baselines: where they read the same, the same tensors."""

    arguments: tuple[Any, ...]
    operands: tuple[Any, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Each once."""
        found = {id(value): value for value in tree_leaves((self.arguments, self.operands)) if isinstance(value, Tensor)}
        return list(found.values())

    def clone(self) -> "Inputs":
        """Returns the same in memory of its own."""
        clones = {id(tensor): tensor.clone() for tensor in self.tensors()}
        return Inputs(*tree_map(lambda value: clones.get(id(value), value), (self.arguments, self.operands)))


class Source:
    """Standard normal numbers, made once for each size: those of the largest sizes take seconds."""

    def __init__(self) -> None:
        self._made: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""
        return sum(tensor.nbytes for tensor in self._made.values())

    def normal(self, name: str, problem: Problem) -> Tensor:
        """float32 [numel], the same for one name and size. Not to be written to."""
        held = self._made.get(name)
        if held is None or held.numel() != problem.numel:
            generator = torch.Generator(problem.device).manual_seed(sum(name.encode()))
            self._made[name] = torch.randn(problem.numel, generator=generator, device=problem.device)
        return self._made[name]

    def gradient(self, problem: Problem) -> Tensor:
        """[numel] in the problem's dtype."""
        return self.normal("gradient", problem).to(problem.dtype)

    def rows(self, problem: Problem) -> Tensor:
        """[R, width] in the problem's dtype."""
        return self.gradient(problem).view(problem.rows, problem.width)


def _state(problem: Problem, source: Source, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient, residual, threshold (0) and counters of one parameter."""
    threshold = torch.zeros(1, device=problem.device)
    counters = torch.zeros(1, COUNTERS, dtype=torch.int64, device=problem.device)
    counters[0, 0] = step
    return source.gradient(problem), source.normal("residual", problem), threshold, counters


def _select_arguments(problem: Problem, source: Source, method: str, step: int) -> tuple[Any, ...]:
    return (*_state(problem, source, step), problem.layout, problem.selection(method), True)


def select_inputs(problem: Problem, source: Source, method: str, step: int = 0) -> Inputs:
    """Of ``select_threshold``, which is due at step 0 only. Operands: gradient, residual, rank, stride; for "laplace" density."""
    arguments = _select_arguments(problem, source, method, step)
    if method == "laplace":
        return Inputs(arguments, (*arguments[:2], problem.density))
    stride = sample_stride(problem.numel) if method == "sampled" else 1
    return Inputs(arguments, (*arguments[:2], ceil(problem.density * sample_numel(problem.numel, stride)), stride))


def pack_inputs(problem: Problem, source: Source) -> Inputs:
    """Of ``threshold_pack`` just after a refresh: ``density`` of the entries reach the threshold. Operands: state and entries to keep."""
    selected = _select_arguments(problem, source, "exact", 0)
    ops.select_threshold(*selected)
    state = selected[:4]
    return Inputs((*state, problem.layout, True), (*state[:3], problem.kept))


def unpack_inputs(problem: Problem, source: Source, payloads: int) -> Inputs:
    """Of ``unpack_accumulate``: payloads of gradients that are turned against each other, so that different entries are kept.

    Operands: numel, dtype, and indices and values of each payload.
    """
    packed: list[Tensor] = []
    entries: list[Tensor] = []
    grad, residual, threshold, counters, *rest = pack_inputs(problem, source).arguments
    for payload in range(payloads):
        turn = payload * (problem.numel // 3)
        turned_grad, turned_residual = grad.roll(turn), residual.roll(turn)
        entries += baselines.threshold_chain(turned_grad, turned_residual, threshold, problem.kept)[:2]
        packed.append(ops.threshold_pack(turned_grad, turned_residual, threshold, counters, *rest))
    arguments = (torch.cat(packed), None, problem.numel, problem.dtype, problem.layout, payloads)
    return Inputs(arguments, (problem.numel, problem.dtype, *entries))


def unpack_into_inputs(problem: Problem, source: Source, payloads: int) -> Inputs:
    """Of ``unpack_into``: memory of the right size, and the payloads of :func:`unpack_inputs`. No operands."""
    gathered, dense, numel, dtype, layout, divisor = unpack_inputs(problem, source, payloads).arguments
    return Inputs((torch.zeros(numel, dtype=dtype, device=gathered.device), gathered, dense, layout, divisor))


def repack_inputs(problem: Problem, source: Source, payloads: int) -> Inputs:
    """Of ``repack`` just after a refresh, by the owner of a whole parameter. Operands: residual, threshold, indices and values."""
    made = unpack_inputs(problem, source, payloads)
    how = (replace(problem.layout, chunk=0), problem.selection("exact"), True)
    arguments = (made.arguments[0], *_state(problem, source, 0)[1:], *how)
    refreshed = Inputs(arguments).clone().arguments
    ops.repack(*refreshed)
    gathered, residual, *_ = arguments
    state = (residual, *refreshed[2:4])  # the threshold that was chosen, and counters past the step that chose it
    return Inputs((gathered, *state, *arguments[4:]), (*state[:2], *made.operands[2:]))


def pack_rows_inputs(problem: Problem, source: Source, method: str) -> Inputs:
    """Of ``pack_rows``. Operands: rows and entries to keep."""
    x = source.rows(problem)
    return Inputs((x, problem.row_layout(method), method, problem.density, 0.0), (x, problem.kept))


def _packed_rows(problem: Problem, source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """Payload uint8 [R, b], indices int64 and values [R, k]."""
    payload = ops.pack_rows(source.rows(problem), problem.row_layout(), "exact", problem.density, 0.0)
    values, indices, _ = decode_rows(payload, problem.row_layout())
    return payload, indices, values


def unpack_rows_inputs(problem: Problem, source: Source) -> Inputs:
    """Of ``unpack_rows``. Operands: width, dtype, indices, values."""
    payload, indices, values = _packed_rows(problem, source)
    arguments = (payload, problem.row_layout(), 1, problem.dtype)
    return Inputs(arguments, (problem.width, problem.dtype, indices, values))


def gather_rows_inputs(problem: Problem, source: Source) -> Inputs:
    """Of ``gather_rows``. Operands: gradient rows and indices."""
    payload, indices, _ = _packed_rows(problem, source)
    grad = source.normal("residual", problem).to(problem.dtype).view(problem.rows, problem.width)
    return Inputs((grad, payload, problem.row_layout(), VALUE_DTYPE), (grad, indices))


def scatter_rows_inputs(problem: Problem, source: Source) -> Inputs:
    """Of ``scatter_rows``. Operands: width, dtype, indices, values."""
    payload, indices, values = _packed_rows(problem, source)
    arguments = (values, payload, problem.row_layout(), 1, problem.dtype)
    return Inputs(arguments, (problem.width, problem.dtype, indices, values))


def quantize_inputs(problem: Problem, source: Source, bits: int) -> Inputs:
    """Of ``quantize_rows``. Operands: rows and bits."""
    x, seed = source.rows(problem), torch.full((1,), 7, dtype=torch.int64, device=problem.device)
    return Inputs((x, seed, bits), (x, bits))


def dequantize_inputs(problem: Problem, source: Source, bits: int) -> Inputs:
    """Of ``dequantize_rows``. Operands: scales, codes, bits, dtype."""
    payload = ops.quantize_rows(*quantize_inputs(problem, source, bits).arguments)
    scale, codes = payload[:, :2].clone().view(torch.bfloat16), payload[:, 2:].clone().view(torch.int8)
    return Inputs((payload, [problem.width], bits, problem.dtype), (scale, codes, bits, problem.dtype))


def store_inputs(problem: Problem, source: Source) -> Inputs:
    """Of ``store``."""
    return Inputs((torch.zeros(problem.numel, dtype=problem.dtype, device=problem.device), source.gradient(problem)))


def moments_inputs(problem: Problem, source: Source, gaps: bool) -> Inputs:
    """Of ``prepare_moments``: one parameter of Adam, of which a part of the gradient is not zero."""
    draws = source.gradient(problem)
    grad = torch.where(torch.arange(problem.numel, device=problem.device) % round(1 / problem.density) == 0, draws, 0)
    second = [torch.ones_like(grad)] * gaps
    last = [torch.zeros_like(grad, dtype=torch.int32)] * gaps
    scalars = torch.tensor([0.5, 1.0, 0.0, 1000.0, 0.0], device=problem.device)
    shares = spread_shares(0.999, torch.finfo(problem.dtype).eps, torch.float32, problem.device) if gaps else None
    return Inputs((scalars, shares, [grad], [], [torch.zeros_like(grad)], second, last))
