"""``dct_compile.audit``: checks while a model trains that compression loses nothing and keeps the ranks equal.

For every parameter, over all steps that an optimizer has made::

    sum over the ranks of the local gradients  =  ranks * sum of the applied gradients  +  sum over the ranks of the residuals

A mean that arrives late counts as a part of each rank's residual until it joins a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from dct_compile.runtime import RUNTIME, Runtime
from dct_compile.state.entry import Entry, fold_late, fold_share
from dct_compile.state.loss_scale import NO_BACKWARD
from dct_compile.state.spec import LOCAL
from dct_compile.state.store import named_parameters


class AuditError(AssertionError):
    """A gradient was lost or came twice, or the parameters of two ranks differ."""


@dataclass(frozen=True)
class AuditResult:
    """The result of :meth:`Audit.check`.

    ``steps``: optimizer steps so far. ``compressed``: names of the parameters that have a residual. ``error``: the largest difference
    between both sides of the equation, relative to the gradients of its parameter.
    """

    steps: int
    compressed: tuple[str, ...]
    error: float


class _Account:
    """Adds up the gradients of one parameter, in float64 and for an unscaled loss.

    ``local``, ``received``: this rank's gradient and the averaged one, which wait for the optimizer. ``steps``: steps that applied one.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.local: Tensor | None = None
        self.received: Tensor | None = None
        self.local_sum, self.applied_sum = torch.zeros_like(_double(parameter)), torch.zeros_like(_double(parameter))
        self.volume, self.steps = 0.0, 0

    def begin(self) -> None:
        """Forgets a gradient that was discarded: ``zero_grad`` leaves none, or zeros in the place of what had arrived."""
        was_zero = self.received is not None and not self.received.any()
        if self.parameter.grad is None or not (was_zero or self.parameter.grad.any()):
            self.local = self.received = None

    def add(self, gradient: Tensor) -> None:
        self.local = _double(gradient) if self.local is None else self.local + _double(gradient)

    def end(self) -> None:
        self.received = _double(self.parameter.grad) if self.parameter.grad is not None else None

    def apply(self, scale: "float | Tensor") -> None:
        """Books the waiting gradient as applied."""
        if self.local is not None:
            self.local_sum += self.local / scale
            self.volume += (self.local / scale).abs().max().item() if self.local.numel() else 0.0
        if self.received is not None:
            self.applied_sum += self.received / scale
        self.local = self.received = None
        self.steps += 1


class Audit:
    """Watches the gradients of a model; see :func:`audit`."""

    def __init__(self, model: nn.Module, group: ProcessGroup | None, runtime: Runtime) -> None:
        self._model, self._runtime, self._group = model, runtime, group
        ignored = {
            name for module in model.modules() if isinstance(module, DistributedDataParallel) for name in module.parameters_to_ignore
        }
        self._accounts = {
            name: _Account(parameter)
            for name, parameter in named_parameters(model)
            if name not in ignored and not isinstance(parameter, DTensor)
        }
        self._task = NO_BACKWARD
        self._by_parameter = {id(account.parameter): account for account in self._accounts.values()}
        self._handles: list[Any] = [register_optimizer_step_post_hook(self._after_step)]
        for account in self._accounts.values():
            if account.parameter.requires_grad:
                self._handles.append(account.parameter.register_hook(partial(self._at_gradient, account)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stops watching."""
        while self._handles:
            self._handles.pop().remove()

    def check(self) -> AuditResult:
        """Compares both sides of the equation, and the parameters of all ranks. Every rank of the group calls it, between two steps.

        Raises:
            AuditError: a parameter's gradients do not add up, or it differs between ranks. Raised on every rank.
        """
        state = self._runtime.states.state_dict(self._model)
        failures, worst, compressed = [], 0.0, []
        state = {key: entry for key, entry in state.items() if "residual" in entry}
        for name, account in self._accounts.items():
            account.begin()
            entries = [entry for key, entry in state.items() if key == name or key.startswith(f"{name}@")]
            compressed += [name] if entries else []
            error, allowed = self._error(account, entries)
            worst = max(worst, error)
            if not error <= allowed:
                failures.append(f"{name}: gradients and what was made of them differ by {error:.2e} of the gradients")
            if self._differs(account.parameter):
                failures.append(f"{name}: its values differ between the ranks")
        if failures:
            raise AuditError("; ".join(failures))
        return AuditResult(max((account.steps for account in self._accounts.values()), default=0), tuple(compressed), worst)

    def _error(self, account: _Account, entries: list[Entry]) -> tuple[float, float]:
        """Returns the relative error of the equation, and the largest that rounding explains."""
        ranks = dist.get_world_size(self._group)
        scale = self._scale(account)
        local, applied = account.local_sum.clone(), account.applied_sum.clone()
        if account.local is not None and account.received is not None:  # waits for the optimizer
            local, applied = local + account.local / scale, applied + account.received / scale
        waiting = torch.zeros_like(_flat(local))
        for entry in entries:
            waiting += fold_late(fold_share(entry))["residual"].double()
        largest = account.volume + (local.abs().max().item() if local.numel() else 0.0)
        # A group of NCCL alone sends nothing from a CPU.
        volume = torch.tensor([largest], dtype=torch.float64, device=local.device)
        total, applied = _flat(local).clone(), self._of_the_last(_flat(applied), account.steps)
        for tensor in (total, waiting, volume):
            dist.all_reduce(tensor, group=self._group)
        difference = (total - ranks * applied - waiting).abs()
        eps = torch.finfo(account.parameter.dtype).eps
        return (difference.max().item() / max(volume.item(), 1e-300) if difference.numel() else 0.0), 8 * eps

    def _of_the_last(self, applied: Tensor, steps: int) -> Tensor:
        """Returns the gradients of the rank that made the most steps: the others had no more inputs."""
        own = torch.tensor([steps], device=applied.device)
        made = [torch.zeros_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(made, own, group=self._group)
        applied = applied.clone()
        dist.broadcast(applied, group=self._group, group_src=int(torch.cat(made).argmax().item()))
        return applied

    def _differs(self, parameter: Tensor) -> bool:
        """Returns whether ``parameter`` has other bytes on another rank."""
        mine = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
        first = mine.clone()
        dist.broadcast(first, group=self._group, group_src=0)
        differs = torch.tensor([not torch.equal(first, mine)], dtype=torch.int32, device=mine.device)
        dist.all_reduce(differs, group=self._group)
        return bool(differs.item())

    def _at_gradient(self, account: _Account, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            for other in self._accounts.values():
                other.begin()
            # DDP finishes in such a callback as well; a callback that is queued within a callback comes after all others.
            queue: Callable[[Callable[[], None]], None] = Variable._execution_engine.queue_callback
            queue(lambda: queue(self._at_end))
        if not self._observed(account.parameter):  # else it is the average already
            account.add(gradient)

    def _at_end(self) -> None:
        for account in self._accounts.values():
            for local in self._observed(account.parameter):
                account.add(local.view(account.parameter.shape))
                local.data.zero_()
            account.end()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and skipped.item():
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                account = self._by_parameter.get(id(parameter))
                if account is not None and account.parameter is parameter and parameter.grad is not None:
                    account.apply(self._scale(account))

    def _observed(self, parameter: Tensor) -> list[Tensor]:
        """Returns this rank's gradients that compiled graphs have noted, see option ``audit``."""
        entries = [bucket.entry(index) for bucket, index in self._runtime.states.entries(parameter)]
        return [entry[LOCAL] for entry in entries if LOCAL in entry]

    def _scale(self, account: _Account) -> "float | Tensor":
        (use,) = self._runtime.states.use.of([account.parameter])
        return use.scale


def audit(model: nn.Module, group: ProcessGroup | None = None) -> Audit:
    """Checks while ``model`` trains that compression loses nothing and keeps the ranks equal. For tests: it keeps sums in float64::

        with dct_compile.audit(model) as audit:
            for batch in batches:
                train(batch)
            print(audit.check())

    Start it before the first step, on every rank. Steps that an optimizer of torch makes count as applied; gradients that ``zero_grad``
    discards must leave no trace. Gradients that a graph averages itself (``data_parallel``) are seen with option ``audit=True`` alone.

    Args:
        model: The model, with or without the wrappers of DDP and torch.compile.
        group: The ranks that average its gradients, by default all.

    Returns:
        The audit. Its ``check()`` raises :class:`AuditError` where something does not add up.
    """
    return Audit(model, group, RUNTIME)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _flat(tensor: Tensor) -> Tensor:
    """Returns the elements in a row; a complex one as two numbers."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
