"""Lets the ranks of a group agree on their decisions before a compiled graph exchanges anything for the first time."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dct_compile.config import DCTConfig
from dct_compile.exchange import BACKWARD_OF, GRADIENT
from dct_compile.passes.decision import Decision
from dct_compile.passes.graph_utils import resolve_group
from dct_compile.posts import Signature
from dct_compile.report import ReportEntry
from dct_compile.runtime import Runtime
from dct_compile.state.bucket import refer_to

Compiled = Callable[..., Any]
Parameters = list["weakref.ref[Tensor]"]


class FirstUse:
    """Watches one compiled graph: the parameters that it is called with, forward and backward.

    The ranks of a group run their exchanges in the same order, but they compile when they like. So they agree when a graph runs, and only
    about the part that runs: a forward alone on one rank exchanges nothing of the backward.
    """

    def __init__(self, config: DCTConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.entry: ReportEntry | None = None
        self.forward, self.backward = _Half(self), _Half(self)
        self._has_exchanges = False

    def watch(self, entry: ReportEntry) -> None:
        """Tells ``entry`` of the report how the graph is called. The entry lives as long as the graph."""
        self.entry, entry.owner = entry, weakref.ref(self)

    def expect(self, decisions: Sequence[Decision], training: bool) -> None:
        """Remembers the decisions about the graph. ``training``: whether it has a backward of its own."""
        late = (GRADIENT, *BACKWARD_OF.values()) if training else ()
        self._has_exchanges = bool(decisions)
        for decision in decisions:
            if not decision.exchange.group:  # a copy between devices of this process
                continue
            half = self.backward if decision.exchange.kind in late else self.forward
            signature = Signature(decision.exchange.key(), decision.digest, decision.exchange.label)
            half.signatures.setdefault(decision.exchange.group, []).append(signature)

    def before_forward(self, compiled: Compiled, positions: Sequence[int]) -> Compiled:
        """Returns ``compiled``, which agrees before its forward runs. ``positions``: those of the parameters among its arguments."""
        if not self._has_exchanges:
            return compiled

        def run(*args: Any) -> Any:
            parameters = [args[position] for position in positions]
            self.backward.notice(parameters)
            self.forward.notice(parameters)
            self.forward.agree()
            if self.entry is not None:
                self.runtime.reports.serve(self.entry, parameters)
                self.entry.forward_ran()
            with self.forward.explained():
                return compiled(*args)

        return run

    def before_backward(self, compiled: Compiled) -> Compiled:
        """Returns ``compiled``, a partitioned backward, which agrees before it runs."""

        def run(args: list[Any]) -> Any:
            self.backward.agree()
            if self.entry is not None:
                self.runtime.reports.backward_ran(self.entry)
            with self.backward.explained():
                return compiled(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


class _Half:
    """The forward or the backward of a graph. ``waiting``: the parameters of calls that it has not agreed on yet."""

    def __init__(self, owner: FirstUse) -> None:
        self.owner = owner
        self.signatures: dict[str, list[Signature]] = {}
        self.agreed: dict[tuple[int, ...], Parameters] = {}
        self.waiting: dict[tuple[int, ...], Parameters] = {}

    def notice(self, parameters: Sequence[Tensor]) -> None:
        """Records a call with ``parameters``."""
        if not self.signatures:
            return
        key = tuple(map(id, parameters))
        known = self.agreed.get(key)
        if known is None or not refer_to(known, parameters):
            self.waiting[key] = [weakref.ref(parameter) for parameter in parameters]

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Adds to an error of a collective the reason why another rank has left, if there is one."""
        try:
            yield
        except RuntimeError as error:
            for name in self.signatures:
                self.owner.runtime.agreement.explain(resolve_group(name), error)
            raise

    def agree(self) -> None:
        """Agrees with the other ranks on the calls that wait. Raises ``RuntimeError`` on every rank where two ranks differ."""
        if not self.waiting:
            return
        parameters = [found for refs in self.waiting.values() for ref in refs if (found := ref()) is not None]
        runtime, config = self.owner.runtime, self.owner.config
        for name, signatures in self.signatures.items():
            group = resolve_group(name)
            seen = runtime.agreed.setdefault(group, WeakTensorKeyDictionary())
            # All ranks use the parameters of a model for the first time together; a recompilation is one rank's own affair.
            fresh = any(parameter not in seen for parameter in parameters)
            runtime.agreement.check(group, config.comparable(), signatures, fresh=fresh)
            seen.update((parameter, True) for parameter in parameters)
        living = {key: refs for key, refs in self.agreed.items() if all(ref() is not None for ref in refs)}
        self.agreed, self.waiting = living | self.waiting, {}
