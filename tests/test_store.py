"""`store`: state that plain PyTorch updates inside of a compiled graph."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from dct_compile.ops import store
from tests.ranks import fresh_compiler

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
STATES = [
    torch.zeros(()),
    torch.zeros(5),
    torch.zeros(2, 3, dtype=torch.int64),
    torch.zeros(4, 6).t(),
    torch.zeros(0),
    torch.zeros(2, 3)[:, 1],
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", STATES, ids=lambda state: str(list(state.shape)))
def test_the_value_is_copied_and_the_version_stays(state: Tensor, device: str) -> None:
    state = state.to(device).clone(memory_format=torch.preserve_format)
    value = torch.arange(1, state.numel() + 1, device=device).to(state.dtype).view(state.shape)
    version = state._version
    assert store(state, value) is None
    assert torch.equal(state, value)
    assert state._version == version


@pytest.mark.parametrize("state", STATES, ids=lambda state: str(list(state.shape)))
def test_opcheck(state: Tensor) -> None:
    torch.library.opcheck(store, (state.clone(memory_format=torch.preserve_format), torch.ones_like(state)))


@pytest.mark.parametrize("value", [torch.zeros(4), torch.zeros(1, 5), torch.zeros(()), torch.zeros(5, dtype=torch.bfloat16)])
def test_another_shape_or_dtype_is_an_error(value: Tensor) -> None:
    with pytest.raises(ValueError, match=r"value is torch\.\w+ \[.*\]: expected torch\.float32 \[5\], as the state"):
        store(torch.zeros(5), value)


def momentum(grad: Tensor, state: Tensor) -> Tensor:
    """The new state is used after it has been stored, under both its names."""
    new = 0.5 * state + grad
    store(state, new)
    return new * 2 + state


def difference(grad: Tensor, state: Tensor) -> Tensor:
    """The old state, and what depends on it, is used after the new one has been stored."""
    old = state * 3
    store(state, 0.5 * state + grad)
    return old + 1


def two_updates(grad: Tensor, state: Tensor) -> Tensor:
    new, total = 0.5 * state + grad, (state * 3).sum()
    store(state, new)
    newer = state * 2
    store(state, newer + total)
    return newer + new + state


def transposed(grad: Tensor, state: Tensor) -> Tensor:
    new = 0.5 * state.view(8, 5).t() + grad.view(8, 5).t()
    store(state, new.t().reshape(-1))
    return new + 1


def another_dtype(grad: Tensor, state: Tensor) -> Tensor:
    store(state, (state.bfloat16() + grad.bfloat16()).float())
    return state.sum()


SCHEMES = [momentum, difference, two_updates, transposed, another_dtype]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_a_compiled_graph_the_state_changes_in_place(scheme: Callable[[Tensor, Tensor], Tensor], backend: str) -> None:
    grads = [torch.randint(-8, 9, (40,), generator=torch.Generator().manual_seed(step)).float() for step in range(3)]
    expected, found = torch.ones(40), torch.ones(40)
    with fresh_compiler():
        compiled = torch.compile(scheme, backend=backend, fullgraph=True)
        for grad in grads:
            assert torch.equal(compiled(grad, found), scheme(grad, expected))
            assert torch.equal(found, expected)


def test_a_counter_and_a_state_are_updated_by_one_generated_kernel() -> None:
    def step(grad: Tensor, state: Tensor, count: Tensor) -> Tensor:
        new = 0.5 * state + grad
        store(state, new)
        store(count, count + 1)
        return new.abs() / count

    state, count = torch.ones(40), torch.zeros(())
    with fresh_compiler():
        result, code = run_and_get_code(torch.compile(step, fullgraph=True), torch.ones(40), state, count)
    assert "torch.ops.dct" not in code[0]
    assert len(re.findall(r"cpp_fused_\w+\(", code[0].split("def call(")[1])) == 1
    assert (float(state[0]), float(count), float(result[0])) == (1.5, 1.0, 1.5)
