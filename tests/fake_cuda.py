"""A CUDA device that is not there: as much of it as the kernels' launchers and Inductor's code generation ask about."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from torch._dynamo.device_interface import CudaInterface
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget

from dct_compile.triton_kernels import gradient_tables

TARGET = GPUTarget("cuda", 90, 32)
PROPERTIES = SimpleNamespace(
    name="fake",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
    gcnArchName="",
    warp_size=32,
)


@contextmanager
def fake_tables(mode: FakeTensorMode) -> Iterator[None]:
    """The tables of the kernels are tensors of ``mode``, too: there is no device for real ones."""

    def fake(make: Callable[..., Any], *args: Any) -> Any:
        with _disable_current_modes(), mode:
            return make(*args)

    with mock.patch.object(gradient_tables, "_on_another_thread", fake):
        yield


@contextmanager
def fake_device() -> Iterator[None]:
    """Answers what Inductor and Triton ask the driver."""
    answers = {
        "get_device_properties": PROPERTIES,
        "get_compute_capability": 90,
        "current_device": 0,
        "device_count": 1,
        "is_available": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "is_bf16_supported": True,
        "get_raw_stream": 0,
    }
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: TARGET, get_current_device=lambda: 0))
    with ExitStack() as stack:
        for name, answer in answers.items():
            patched = mock.Mock(return_value=answer)
            stack.enter_context(mock.patch.object(CudaInterface, name, patched))
        stack.enter_context(mock.patch.object(CudaInterface.Worker, "get_device_properties", mock.Mock(return_value=PROPERTIES)))
        stack.enter_context(mock.patch.object(CudaInterface.Worker, "current_device", mock.Mock(return_value=0)))
        stack.enter_context(mock.patch("torch.cuda.get_device_properties", mock.Mock(return_value=PROPERTIES)))
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", mock.Mock(return_value=(9, 0))))
        stack.enter_context(mock.patch("torch.cuda.current_device", mock.Mock(return_value=0)))
        yield
