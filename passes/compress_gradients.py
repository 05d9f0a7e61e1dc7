"""Rewrites the all_reduce of a gradient buffer: select the threshold, pack, exchange payloads, accumulate.

"gather": everybody's payload goes to everybody::

    mean = all_reduce(grad, "avg")       dct.select_threshold(grad, residual, threshold!)      skips itself on most steps
                                         payload  = dct.threshold_pack(grad, residual!, ...)
                                  ==>    gathered = all_gather_into_tensor(payload)
                                         mean     = dct.unpack_accumulate(gathered, divisor=ranks)

"owner": each rank owns a share of every parameter. The payload's chunks go to their owners by all_to_all, each owner sums its chunk and
thresholds the sum again with a residual of its own (``dct.repack``), and that payload is gathered: the bytes per rank do not grow with
the ranks.

Parameters that stay dense are taken out of the buffer, reduced together and put back while unpacking. The state (residual, threshold,
counters; twice under "owner") enters as graph inputs and is updated in place.
"""

from collections.abc import Callable, Sequence

import torch
from torch import fx

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.config import DCTConfig
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.plan import Decision, GradientPlan
from dct_compile.triton_kernels.layout import GradientLayout, Selection

aten, c10d, dct = torch.ops.aten, torch.ops._c10d_functional, torch.ops.dct


def compress_gradients(
    graph: fx.Graph, decisions: Sequence[Decision], state: Callable[[Decision], Sequence[fx.Node]], config: DCTConfig
) -> int:
    """Executes the "gradient" decisions on ``graph``; returns the number of sites that were rewritten.

    ``state(decision)`` gives the placeholders of the site's state: residual, threshold, counters of the local stage, then those of the
    owner's stage where the plan has one.
    """
    chosen = [decision for decision in decisions if decision.codec == "gradient"]
    for decision in chosen:
        _Rewrite(decision, list(state(decision)), config).run()
    return len(chosen)


class _Rewrite:
    """One site. The collectives start where the all_reduce stood; what waits for them is placed where the all_reduce was waited for."""

    def __init__(self, decision: Decision, state: list[fx.Node], config: DCTConfig) -> None:
        assert decision.gradient is not None
        self.site, self.state, self.config = decision.site, state, config
        self.plan: GradientPlan = decision.gradient
        node = self.site.node
        self.start = gu.Inserter(node.graph, node, node, in_backward=True, label=self.site.label)
        self.finish = gu.Inserter(node.graph, gu.waits(node)[0], node, in_backward=True, label=self.site.label)
        self.group = gu.argument(self.site.node, "group_name")
        self.average = gu.argument(self.site.node, "reduce_op").lower() == "avg"

    def run(self) -> None:
        gradient = self.site.node.args[0]
        assert isinstance(gradient, fx.Node)
        shape = gradient.meta["val"].shape
        if len(shape) != 1:
            gradient = self.start.call(aten.reshape.default, gradient, [-1])
        dense = self._reduce_dense(gradient)
        size = self.site.group_size
        payload = self._select_and_pack(gradient)
        if self.plan.owner_layout is None:
            gathered = self.start.call(c10d.all_gather_into_tensor.default, payload, size, self.group)
        else:
            gathered = self._reduce_at_owner(payload, self.plan.owner_layout)
        waited = self.finish.call(gu.WAIT, gathered)
        reduced = self._unpack(waited, dense, gradient.meta["val"].dtype, size if self.average else 1)
        if len(shape) != 1:
            reduced = self.finish.call(aten.reshape.default, reduced, list(shape))
        for wait in gu.waits(self.site.node):
            wait.replace_all_uses_with(reduced)
            wait.graph.erase_node(wait)
        self.site.node.graph.erase_node(self.site.node)

    def _reduce_at_owner(self, payload: fx.Node, layout: GradientLayout) -> fx.Node:
        size = self.site.group_size
        splits = [layout.chunk_bytes] * size
        started = self.start.call(c10d.all_to_all_single.default, payload, splits, splits, self.group)
        received = self.finish.call(gu.WAIT, started)
        chunk = self.finish.call(
            dct.repack.default,
            *(received, *self.state[3:], layout, self._selection, self.config.error_feedback),
            site=self.site.label,
            receives="all_to_all_single",
            sends="all_gather_into_tensor",
        )
        return self.finish.call(c10d.all_gather_into_tensor.default, chunk, size, self.group)

    @property
    def _selection(self) -> Selection:
        config = self.config
        method, fixed = config.threshold_method, config.fixed_threshold
        return Selection(config.dp_density, method, fixed, config.refresh_interval, config.refresh_warmup)

    def _select_and_pack(self, gradient: fx.Node) -> fx.Node:
        state = (gradient, *self.state[:3], self.plan.layout)
        feedback, site = self.config.error_feedback, self.site.label
        sends = "all_gather_into_tensor" if self.plan.owner_layout is None else "all_to_all_single"
        self.start.call(dct.select_threshold.default, *state, self._selection, feedback, site=site)
        return self.start.call(dct.threshold_pack.default, *state, feedback, site=site, sends=sends)

    def _unpack(self, payloads: fx.Node, dense: fx.Node | None, dtype: torch.dtype, divisor: int) -> fx.Node:
        layout = self.plan.layout
        return self.finish.call(
            dct.unpack_accumulate.default,
            *(payloads, dense, self.plan.numel, dtype, layout, divisor),
            site=self.site.label,
            receives="all_gather_into_tensor",
        )

    def _reduce_dense(self, gradient: fx.Node) -> fx.Node | None:
        """The reduced values of the parameters that stay dense, end to end in order of offset."""
        if not self.plan.dense:
            return None
        ordered = sorted(self.plan.dense, key=lambda segment: segment.offset)
        parts = [
            self.start.call(aten.slice.Tensor, gradient, 0, segment.offset, segment.offset + segment.parameter.numel) for segment in ordered
        ]
        flat = self.start.call(aten.cat.default, parts)
        reduce_op = gu.argument(self.site.node, "reduce_op")
        started = self.start.call(c10d.all_reduce.default, flat, reduce_op, self.group)
        return self.finish.call(gu.WAIT, started)
