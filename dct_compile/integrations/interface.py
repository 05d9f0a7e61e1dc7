"""The interface of an integration: it puts the schemes in the place of collectives that live outside of every graph."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from dct_compile.config import DCTConfig
from dct_compile.passes.decision import Decision
from dct_compile.runtime import Runtime

Compiled = Callable[..., Any]


class Integration(Protocol):
    """A kind of wrapper that exchanges gradients by itself, such as DistributedDataParallel. A wrapper here is called a target.

    ``averages``: whether a target averages the gradients of copies, so that ``data_parallel`` would average them a second time.
    """

    averages: bool

    def active(self) -> Sequence[Any]:
        """Returns the targets whose ``forward`` is running now, innermost first."""

    def attach(self, target: Any, config: DCTConfig, runtime: Runtime) -> None:
        """Lets ``target`` exchange its gradients compressed, from the next backward on.

        Reports the target as dense, with the reason, where nothing would be compressed. Does nothing the second time, but for a note where
        another ``config`` would have decided otherwise.
        """

    def attach_at_calls(self, compiled: Compiled, positions: Sequence[int], config: DCTConfig, runtime: Runtime) -> Compiled:
        """Returns ``compiled``, a graph, which attaches the targets that it is called inside of, before it runs.

        A target cannot be attached when a graph is compiled: Dynamo may call a graph inside of targets that it was not compiled in.

        Args:
            compiled: The compiled graph.
            positions: The positions of the parameters among its arguments.
            config: The options of the graph; they hold for the targets that it is the first to run in.
            runtime: Where to report.
        """

    def preview(self, target: Any, config: DCTConfig, runtime: Runtime) -> list[Decision]:
        """Reports the result that :meth:`attach` will have, and attaches nothing.

        Returns:
            The decisions about all that ``target`` sends in a step, gradients in the order in which they are ready.
        """

    def paused(self, model: nn.Module) -> AbstractContextManager[None]:
        """While it lasts, the targets in ``model`` neither send anything nor prepare for a backward."""
