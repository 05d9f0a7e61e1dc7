"""Pipelines: ``torch.distributed.pipelining`` sends stage outputs and their gradients itself, outside of every graph."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from dct_compile.config import DCTConfig
from dct_compile.integrations.interface import Compiled
from dct_compile.integrations.pipeline_agreement import Pipeline
from dct_compile.integrations.pipeline_stage import StageCompressor
from dct_compile.passes.decision import Decision
from dct_compile.runtime import Runtime

if TYPE_CHECKING:
    from torch.distributed.pipelining.stage import _PipelineStageBase

_MODULE = "torch.distributed.pipelining.stage"


class PipelineIntegration:
    """The integration of pipelines; a target is a stage. A pipeline averages no gradients, so no target counts as active."""

    averages = False

    def active(self) -> Sequence[Any]:
        return ()

    def attach(self, target: "_PipelineStageBase", config: DCTConfig, runtime: Runtime) -> None:
        group = target.group if target.group is not None else dist.group.WORLD
        assert group is not None
        if target in runtime.attached or group.size() == 1 or dist.get_backend(group) == "fake":
            return
        runtime.reports.has_shards = True  # the ranks hold other parameters: nobody has to average their gradients
        pipeline = _pipeline_of(target, group, config, runtime)
        runtime.attached[target] = pipeline
        StageCompressor(target, pipeline).attach()

    def attach_at_calls(self, compiled: Compiled, positions: Sequence[int], config: DCTConfig, runtime: Runtime) -> Compiled:
        def run(*args: object) -> object:
            stage = running_stage()
            if stage is not None:
                self.attach(stage, config, runtime)
            return compiled(*args)

        if hasattr(compiled, "serialize"):  # ahead-of-time compilation stores the graph itself
            run.serialize = compiled.serialize  # type: ignore[attr-defined]
        return run

    def preview(self, target: "_PipelineStageBase", config: DCTConfig, runtime: Runtime) -> list[Decision]:
        return []

    @contextmanager
    def paused(self, model: nn.Module) -> Iterator[None]:
        yield  # a model alone sends nothing: its schedule does


def running_stage() -> "_PipelineStageBase | None":
    """Returns the pipeline stage whose module is running in this thread, ``None`` where there is none."""
    module = sys.modules.get(_MODULE)
    if module is None:  # importing it takes long, and who uses it has done so
        return None
    base: type[_PipelineStageBase] = module._PipelineStageBase
    frame = inspect.currentframe()
    while frame is not None:
        # Only frames of torch: a frame keeps what f_locals has shown until it ends.
        if frame.f_globals is module.__dict__ and isinstance(stage := frame.f_locals.get("self"), base):
            return stage
        frame = frame.f_back
    return None


def _pipeline_of(stage: "_PipelineStageBase", group: dist.ProcessGroup, config: DCTConfig, runtime: Runtime) -> Pipeline:
    """Returns the pipeline that ``stage`` is a part of: the one whose other stages on this rank came before, else a new one."""
    known: Callable[[Any], bool] = lambda item: isinstance(item, Pipeline) and item.takes(stage, group)  # noqa: E731
    pipeline = next(filter(known, runtime.attached.values()), None) or Pipeline(group, stage.num_stages, config, runtime)
    pipeline.indices.add(stage.stage_index)
    return pipeline
