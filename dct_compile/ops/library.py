"""The namespace `dct` of custom operators, how one is defined, and the ranges that a profiler shows of them.

Geometry is one argument: a `Value`, which a graph holds as a constant and generated code makes again from its printed form.
"""

import threading
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch._library import opaque_object
from torch.profiler import record_function

from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.build import is_ready
from dct_compile.triton_kernels.layout import GradientLayout, RowLayout, Selection
from dct_compile.triton_kernels.values import Value

LIBRARY = torch.library.Library("dct", "DEF")
"""Kept for the life of the process: its end would unregister the operators."""
CUDA_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
"""The Triton implementation of each operator, for a graph that is to show its launches instead of the operator."""
_RANGE_ARGUMENTS = ', *, str site="", str receives="", str sends=""'


class _InFlight(threading.local):
    """The ranges of this thread's exchanges that are under way, oldest first."""

    def __init__(self) -> None:
        self.ranges: defaultdict[str, list[record_function]] = defaultdict(list)

    def begin(self, name: str) -> None:
        started = record_function(name)
        started.__enter__()
        self.ranges[name].append(started)

    def end(self, name: str) -> None:
        if self.ranges[name]:  # else the profiler was started while it was under way
            self.ranges[name].pop(0).__exit__(None, None, None)


_IN_FLIGHT = _InFlight()


def _in_range(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a profiler see ``function``, and the exchange that it ends or starts, by the name of the site. Free when none is running."""

    @wraps(function)
    def call(*args: Any, site: str = "", receives: str = "", sends: str = "") -> Any:
        if not torch.autograd.profiler._is_profiler_enabled:
            return function(*args)
        if receives:
            _IN_FLIGHT.end(f"dct::{receives} {site}")
        with record_function(f"dct::{name} {site}".rstrip()):
            result = function(*args)
        if sends:
            _IN_FLIGHT.begin(f"dct::{sends} {site}")
        return result

    return call


def _without_range(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, site: str = "", receives: str = "", sends: str = "") -> Any:
        return function(*args)

    return call


def _on_device_of_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the one that the tensors are on."""

    @wraps(function)
    def call(first: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *args)

    return call


def _where_compiled(compiled: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """Calls ``compiled`` where the C++ kernels are ready, else ``reference``, whose results are the same bytes.

    So a first training step does not wait for the kernels, which are built beside Inductor's own work.
    """

    @wraps(compiled)
    def call(*args: Any) -> Any:
        return compiled(*args) if is_ready() else reference(*args)

    return call


def _checked(check: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls ``function`` with arguments that ``check`` has let pass."""

    @wraps(function)
    def call(*args: Any) -> Any:
        check(*args)
        return function(*args)

    return call


def _value_type(cls: type[Value]) -> str:
    """Lets operators take values of ``cls``; returns the name of that type in a schema."""
    if hasattr(opaque_object, "register_custom_class"):  # torch 2.14 and later
        opaque_object.register_custom_class(cls, typ="constant")
    else:
        opaque_object.register_opaque_type(cls, typ="value")
    return opaque_object.get_opaque_type_name(cls)


LAYOUT, SELECTION, ROWS = _value_type(GradientLayout), _value_type(Selection), _value_type(RowLayout)
"""The types of values in schemas."""


def define_op(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    triton: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Defines ``dct::name`` from its schema ``"name(...) -> ..."`` and returns its one overload.

    The implementations must leave the version counters of the tensors that they mutate alone (write through ``.data`` or raw pointers): a
    residual is saved for the backward of the step before, and changing it by then is intended.

    Every operator also takes three keyword arguments that only name things, in generated code and in a profiler, and never reach the
    functions above. ``site``: whose work it is. ``receives``, ``sends``: the collective that brought its input, or that carries its
    result away. While a profiler runs, the operator is a range ``dct::name site``, and the exchange one named by its collective: from
    the end of the operator that sends to the start of the one that receives, so it holds all that runs in between.

    Args:
        schema: Name, arguments and results, without the keyword arguments that only name things.
        check: Raises ValueError for tensors and numbers that the operator does not take. The functions below trust it. It also sees fake
            tensors, and sizes that are symbolic.
        fake: Returns a result of the right shape, dtype and strides without touching data.
        reference: Does the work in PyTorch, on any device: the specification, and the fallback of the others.
        cpu: Does the same by the C++ kernels; the reference takes its place where these cannot be compiled.
        triton: Does the same by Triton kernels on CUDA; the reference takes its place where there is no Triton.
    """
    name = schema.split("(", 1)[0]
    arguments, result = schema.rsplit(") -> ", 1)
    LIBRARY.define(f"{arguments}{_RANGE_ARGUMENTS}) -> {result}", tags=(torch.Tag.pt2_compliant_tag,))
    on_cpu = reference if cpu is None else _where_compiled(cpu, reference)
    on_cuda = triton if triton is not None and HAS_TRITON else reference
    LIBRARY.impl(name, _in_range(name, _checked(check, on_cpu)), "CPU")
    LIBRARY.impl(name, _in_range(name, _checked(check, _on_device_of_first(on_cuda))), "CUDA")
    torch.library.register_fake(f"dct::{name}", _without_range(_checked(check, fake)), lib=LIBRARY)
    overload: torch._ops.OpOverload = getattr(torch.ops.dct, name).default
    if triton is not None:
        CUDA_IMPLEMENTATIONS[overload] = on_cuda
    return overload
