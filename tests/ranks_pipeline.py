"""Small pipelines and their trainings, for tests that several ranks run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

import dct_compile
from dct_compile.backend import dct
from dct_compile.report import SiteReport

CHUNKS, BATCH, WIDTH = 4, 16, 32


class Block(nn.Module):
    """A residual block; its parameters depend on ``index`` alone."""

    def __init__(self, index: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(index)
        self.up, self.down = nn.Linear(WIDTH, 64, dtype=dtype), nn.Linear(64, WIDTH, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@dataclass
class Passed:
    """The tensors that passed the ends of one stage, in order: given to it, returned by it, and their gradients."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    input_grads: list[Tensor] = field(default_factory=list)
    output_grads: list[Tensor] = field(default_factory=list)

    def of_microbatches(self) -> "Passed":
        """Returns the tensors of the microbatches. A buffer is the same tensor in several steps, and a hook stays with it."""
        return Passed(*(list(values[-CHUNKS:]) for values in (self.inputs, self.outputs, self.input_grads, self.output_grads)))


class Recorded(nn.Module):
    """Runs a module, and remembers what passes its ends."""

    def __init__(self, module: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.passed = module, Passed()

    def forward(self, *inputs: Tensor) -> Any:
        result = self.module(*inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        for tensors, values, grads in (
            (inputs, self.passed.inputs, self.passed.input_grads),
            (outputs, self.passed.outputs, self.passed.output_grads),
        ):
            for tensor in tensors:
                values.append(tensor.detach().clone())
                if tensor.requires_grad:
                    tensor.register_hook(partial(_keep, grads))
        return result


def _keep(kept: list[Tensor], grad: Tensor | None) -> None:
    if grad is not None:
        kept.append(grad.clone())


def loss_of(output: Any, target: Tensor) -> Tensor:
    first = output[0] if isinstance(output, tuple) else output
    return (first.float() - target).square().mean()


class Pipe:
    """A pipeline, with the stages of this rank.

    Args:
        name: the schedule.
        make: makes the module of a stage, to be compiled.
        compiles: whether the stage of an index is compiled.
        options: of backend "dct".
    """

    def __init__(
        self,
        name: str = "1f1b",
        make: Callable[[int], nn.Module] = Block,
        compiles: Callable[[int], bool] = lambda index: True,
        options: dict[str, Any] | None = None,
        loss: Callable[[Any, Tensor], Tensor] = loss_of,
    ) -> None:
        schedule, per_rank = SCHEDULES[name]
        self.rank, size = dist.get_rank(), dist.get_world_size()
        count = size * per_rank
        mine = range(self.rank, count, size) if name != "v" else (self.rank, count - 1 - self.rank)
        self.modules = {index: make(index) for index in mine}
        self.recorded = {
            index: Recorded(torch.compile(module, backend=dct, options=options) if compiles(index) else module)
            for index, module in self.modules.items()
        }
        self.stages = [PipelineStage(module, index, count, torch.device("cpu")) for index, module in self.recorded.items()]
        self.schedule = schedule(self.stages if per_rank > 1 else self.stages[0], CHUNKS, loss_fn=loss)
        self.is_last = any(stage.is_last for stage in self.stages)

    def step(self, x: Tensor, target: Tensor) -> float:
        """Runs one training step without an optimizer. Returns the loss on the rank of the last stage, 0 elsewhere."""
        self._begin()
        losses: list[Tensor] = []
        self.schedule.step(*self._inputs(x), target=target, losses=losses if self.is_last else None)
        return sum(loss.item() for loss in losses) / CHUNKS

    def evaluate(self, x: Tensor, target: Tensor) -> None:
        self._begin()
        with torch.no_grad():
            self.schedule.eval(*self._inputs(x), target=target)

    def passed(self) -> dict[int, Passed]:
        """Returns what has passed the ends of each stage of this rank in the last call, without the run that finds out the shapes."""
        return {index: recorded.passed.of_microbatches() for index, recorded in self.recorded.items()}

    def _begin(self) -> None:
        for recorded in self.recorded.values():
            recorded.passed = Passed()

    def _inputs(self, x: Tensor) -> list[Tensor]:
        return [x] * any(stage.is_first for stage in self.stages)


class V(_PipelineScheduleRuntime):
    """Runs all forwards, then all backwards, on two ranks: one has the stages 0 and 3. torch's own V-schedules take no compiled stage."""

    def __init__(self, stages: list[PipelineStage], chunks: int, **settings: Any) -> None:
        super().__init__(stages, chunks, **settings)
        orders = {0: ("F", 0, 3), 1: ("F", 1, 2)}, {0: ("B", 3, 0), 1: ("B", 2, 1)}
        lines: dict[int, list[_Action | None]] = {0: [], 1: []}
        for order in orders:
            for rank, (kind, *indices) in order.items():
                places = [(i, c) for i in indices for c in range(chunks)] if rank == 0 else [(i, c) for c in range(chunks) for i in indices]
                lines[rank] += [_Action.from_str(f"{index}{kind}{chunk}") for index, chunk in places]
        self._prepare_schedule_with_comms(lines)


SCHEDULES: dict[str, tuple[type[Any], int]] = {
    "gpipe": (ScheduleGPipe, 1),
    "1f1b": (Schedule1F1B, 1),
    "interleaved": (ScheduleInterleaved1F1B, 2),
    "v": (V, 2),
}
"""The schedule and its stages per rank, by name."""


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, WIDTH, generator=generator).to(dtype)
    return x, torch.randn(BATCH, WIDTH, generator=generator)


def sites() -> list[SiteReport]:
    """Returns the report's rows about messages between stages."""
    return [site for site in dct_compile.report().sites if site.collective == "send"]


def decoded(x: Tensor) -> Tensor:
    """Returns the rows that arrive where ``x`` is sent as int8 rows."""
    seed = x.view(torch.int32 if x.itemsize == 4 else torch.int16).sum().reshape([1])
    codes = torch.ops.dct.quantize_rows(x, seed, 8)
    rows: Tensor = torch.ops.dct.dequantize_rows(codes, list(x.shape[1:]), 8, x.dtype)
    return rows
