"""The interface of a scheme: it makes an offer for an exchange, or declines."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from dct_compile.comm import Comm, Steps, finish
from dct_compile.config import DCTConfig
from dct_compile.exchange import Exchange
from dct_compile.schemes.members import Members
from dct_compile.state.spec import StateSpec
from dct_compile.traffic import Traffic


@dataclass(frozen=True)
class Declined:
    """A scheme that was asked for cannot carry an exchange, for ``reason``."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Offer(ABC):
    """How a scheme would carry ``exchange``.

    ``scheme``: the scheme's name. ``reason``: the words of the report when the offer is taken. ``too_large``: the words when it is not
    taken because the dense collective sends less. ``traffic``: the work per call and rank. ``digest``: the numbers on which all ranks of
    the group must agree. ``density``: the fraction of the elements that a payload holds, where it is fixed.
    """

    exchange: Exchange
    scheme: str
    reason: str
    too_large: str
    traffic: Traffic
    digest: str
    density: float | None = None


@dataclass(frozen=True, kw_only=True)
class GradientOffer(Offer):
    """An offer to average a gradient buffer.

    ``members``: the parameters that are compressed. ``state``: the tensors that :meth:`steps` keeps from step to step.
    """

    members: Members
    state: StateSpec

    @abstractmethod
    def steps(self, grad: Tensor, state: Mapping[str, Tensor], comm: Comm, *, in_place: bool = False) -> Steps:
        """Reduces the buffer ``grad`` [numel] over the ranks. The result is a tensor of its shape and dtype.

        The function yields what a collective has started, where it needs the result of it. ``state`` is updated in place, by this
        project's operators alone: a compiled graph keeps it saved from forward to backward.

        Args:
            grad: The buffer, contiguous.
            state: The tensors that are kept from step to step, by name.
            comm: The collectives over the ranks.
            in_place: Whether the result is written to ``grad``; else it is a new tensor. No graph asks for it.
        """

    def reduce(self, grad: Tensor, state: Mapping[str, Tensor], comm: Comm, *, in_place: bool = False) -> Tensor:
        """Runs :meth:`steps` to their end, and returns the result."""
        return finish(self.steps(grad, state, comm, in_place=in_place), comm)


@dataclass(frozen=True, kw_only=True)
class RowOffer(Offer):
    """An offer to carry rows forward, and their gradient backward.

    ``backward_traffic``, ``backward_reason``: work and words of the exchange that carries the gradient, where there is one.
    """

    backward_traffic: Traffic | None = None
    backward_reason: str = ""

    @abstractmethod
    def forward(self, x: Tensor, comm: Comm) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Exchanges ``x`` [R, ...]. Returns the result of the collective, and the tensors that :meth:`backward` wants."""

    @abstractmethod
    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], comm: Comm) -> Tensor:
        """Exchanges the gradient ``dy`` of the forward's result. Returns the gradient of its input."""

    def local_backward(self, dy: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        """Returns the gradient of the input where the backward sends nothing: ``dy`` at the elements that the forward sent."""
        return dy


@dataclass(frozen=True)
class Scheme:
    """A way to carry exchanges.

    ``offer`` returns an offer for an exchange, the reason why not, or ``None`` where the kind of the exchange or the options ask for
    another scheme.
    """

    name: str
    offer: Callable[[Exchange, DCTConfig], Offer | Declined | None]

    def ask(self, exchange: Exchange, config: DCTConfig) -> Offer | Declined | None:
        """Returns the answer of ``offer``, whose traffic counts what it costs to start as well."""
        made = self.offer(exchange, config)
        return replace(made, traffic=made.traffic.starting(exchange.start_s)) if isinstance(made, Offer) else made
