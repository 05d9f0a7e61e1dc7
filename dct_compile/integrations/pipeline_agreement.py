"""Lets all stages of a pipeline begin to encode in the same step.

The ends of an edge must change together, and a stage may not be compiled with backend "dct" at all. So the messages stay dense until every
stage has said, in the store, that it can decode. Nothing waits for a stage that may never come::

    step k      forward     each stage says it before it sends anything
                backward    each stage looks: has every stage said it?
    step k + 1  start       if so, the ranks compare their options, and encode from here on

All stages see the same in one step. A gradient comes only when the stages behind have run their forwards, and no stage before can begin the
next step without the gradient that this one is about to send.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch._C._distributed_c10d import PrefixStore
from torch.distributed import ProcessGroup

from dct_compile.config import DCTConfig
from dct_compile.groups import store_of_life
from dct_compile.link import Link
from dct_compile.posts import Signature
from dct_compile.reasons import Reason, abbreviated
from dct_compile.runtime import Runtime

if TYPE_CHECKING:
    from torch.distributed.pipelining.stage import _PipelineStageBase

_OPTIONS = ("activation_codec", "mp_density", "exempt", "mp_eval", "link")
"""The options on which both ends of an edge depend."""


@dataclass(eq=False)
class Pipeline:
    """The stages of one pipeline on this rank, and what is known about those of the other ranks.

    ``config``: the options of the first graph that ran in one of them. ``indices``: the stages of this rank. ``reason``: the reason why
    messages stay dense, ``None`` once all ranks have agreed. ``link``: the link of the group, from then on.
    """

    group: ProcessGroup
    num_stages: int
    config: DCTConfig
    runtime: Runtime
    indices: set[int] = field(default_factory=set)
    reason: str | None = Reason.PIPELINE_STARTS
    link: Link | None = None
    _is_complete: bool = False
    _has_looked: bool = False
    _store: PrefixStore = field(init=False)

    def __post_init__(self) -> None:
        self._store, _ = store_of_life(self.group, f"pipeline of {self.num_stages} stages")

    def takes(self, stage: "_PipelineStageBase", group: ProcessGroup) -> bool:
        """Returns True if ``stage`` can be a part of this pipeline."""
        return (self.group, self.num_stages) == (group, stage.num_stages) and stage.stage_index not in self.indices

    def post(self, index: int) -> None:
        """Says that stage ``index`` can decode. Not by ``set``, which returns before the store knows."""
        self._store.add(_key(index), 1)

    def look(self) -> None:
        """Looks whether every stage has said so, once in a step. Waits for none."""
        if self._is_complete or self._has_looked:
            return
        self._has_looked = True
        keys = [_key(index) for index in range(self.num_stages)]
        self._is_complete = self._store.check(keys)
        missing = [key for key in keys if not self._is_complete and not self._store.check([key])]
        self.reason = Reason.PIPELINE_LACKS.format(stages=abbreviated(missing)) if missing else Reason.PIPELINE_STARTS

    def begin_step(self) -> None:
        """Compares the options with the other ranks, once all stages are there; all ranks begin this step.

        Raises:
            RuntimeError: They differ.
        """
        self._has_looked = False
        if not self._is_complete or self.reason is None:
            return
        config = self.config
        options = config.comparable()
        decision = ", ".join(f"{name}={options[name]!r}" for name in _OPTIONS)
        signature = Signature(f"messages of {self.num_stages} stages", decision, "pipeline")
        self.runtime.agreement.check(self.group, options, [signature], fresh=True)
        self.link = self.runtime.links.of(self.group, config.link)
        self.reason = None


def _key(index: int) -> str:
    return f"stage {index}"
