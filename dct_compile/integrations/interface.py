"""The interface of an integration: it puts the schemes in the place of collectives that live outside of every graph."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from dct_compile.config import DCTConfig
from dct_compile.runtime import Runtime

Compiled = Callable[..., Any]


class Integration(Protocol):
    """A kind of wrapper that exchanges gradients by itself, such as DistributedDataParallel. A wrapper here is called a target."""

    def active(self) -> Sequence[Any]:
        """Returns the targets whose ``forward`` is running now, innermost first: a backend is called inside of them."""

    def attach(self, target: Any, config: DCTConfig, runtime: Runtime) -> None:
        """Lets ``target`` exchange its gradients compressed, from the next backward on. Does nothing the second time.

        Reports the target as dense, with the reason, where nothing would be compressed.
        """

    def preview(self, target: Any, config: DCTConfig, runtime: Runtime) -> None:
        """Reports the result that :meth:`attach` will have, and attaches nothing."""

    def track_parameters(self, compiled: Compiled, targets: Sequence[Any], positions: Sequence[int]) -> Compiled:
        """Returns ``compiled``, which tells ``targets`` the parameters that it is called with: its arguments at ``positions``."""

    def paused(self, model: nn.Module) -> AbstractContextManager[None]:
        """While it lasts, the targets in ``model`` neither send anything nor prepare for a backward."""
