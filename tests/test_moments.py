"""`prepare_moments`: the C++ and Triton kernels do what the reference does, element for element."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from dct_compile.moments import Preparation
from dct_compile.ops import prepare_moments
from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.build import load_library
from dct_compile.triton_kernels.cpu.moments import prepare_moments_cpu
from dct_compile.triton_kernels.moments import prepare_moments_reference, spread_shares
from dct_compile.triton_kernels.moments_triton import prepare_moments_triton

KERNELS = [
    pytest.param(prepare_moments_cpu, id="cpu", marks=pytest.mark.skipif(load_library() is None, reason="no C++ compiler")),
    pytest.param(
        prepare_moments_triton,
        id="triton",
        marks=[
            pytest.mark.skipif(not HAS_TRITON, reason="no Triton"),
            pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy, at NaN and infinity
        ],
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP = 100_000
GAPS = torch.tensor([1, 2, 3, 17, 1000, 5000, STEP - 1], dtype=torch.int32)
Lists = list[list[Tensor]]


def shares_of(dtype: torch.dtype = torch.float32, beta2: float = 0.99) -> Tensor:
    return spread_shares(beta2, torch.finfo(dtype).eps, torch.float32, torch.device("cpu"))


def numbers(factor: float = 0.7, unscale: float = 1.0, decay: float = 0.0, skipped: float = 0.0) -> Tensor:
    return torch.tensor([factor, unscale, decay, STEP, skipped])


def lists_of(sizes: Sequence[int | tuple[int, ...]], dtype: torch.dtype, density: float) -> Lists:
    """Returns gradients of which about ``density`` is not zero, parameters, both moments, and the steps of the last arrivals."""
    generator = torch.Generator().manual_seed(len(sizes))
    made: Lists = [[], [], [], [], []]
    for size in sizes:
        draws = [torch.randn(size, generator=generator) for _ in range(4)]
        grad = torch.where(torch.rand(size, generator=generator) < density, draws[0], 0.0)
        last = STEP - GAPS[torch.randint(len(GAPS), grad.shape, generator=generator)]
        for held, tensor in zip(made, (grad, draws[1], draws[2], draws[3].abs(), last), strict=True):
            held.append(tensor if tensor.dtype == torch.int32 else tensor.to(dtype))
    return made


def copied(lists: Lists) -> Lists:
    return [[tensor.clone(memory_format=torch.preserve_format) for tensor in held] for held in lists]


def check(kernel: Callable[..., None], scalars: Tensor, shares: Tensor | None, lists: Lists) -> Lists:
    """Compares what ``kernel`` makes of ``lists`` with what the reference does, and returns it."""
    found, expected = copied(lists), copied(lists)
    kernel(scalars, shares, *found)
    prepare_moments_reference(scalars, shares, *expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    return found


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_sizes_and_densities(kernel: Callable[..., None], dtype: torch.dtype, density: float) -> None:
    lists = lists_of([1, 0, 63, 64, 65, 1023, 1024, 1025, (3, 50)], dtype, density)
    *_, last = check(kernel, numbers(), shares_of(dtype), [lists[0], [], *lists[2:]])
    assert all(torch.equal(new == STEP, (grad != 0) | (old == STEP)) for new, old, grad in zip(last, lists[4], lists[0], strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scalars",
    [
        numbers(decay=0.1),
        numbers(unscale=-1.0, decay=0.1),
        numbers(unscale=0.25),
        numbers(unscale=1 / 3, decay=0.03),
        numbers(skipped=1.0),
    ],
    ids=["decay", "maximize", "scale", "all", "skipped"],
)
def test_numbers(kernel: Callable[..., None], dtype: torch.dtype, scalars: Tensor) -> None:
    lists = lists_of([700, 2100], dtype, 0.1)
    found = check(kernel, scalars, shares_of(dtype), lists if scalars[2] != 0 else [lists[0], [], *lists[2:]])
    changed = [not torch.equal(new, old) for new, old in zip(found[2] + found[3], lists[2] + lists[3], strict=True)]
    assert changed == [scalars[4] == 0] * 4


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("missing", [(2,), (3, 4), (2, 3, 4)])
def test_what_is_not_given_plays_no_part(kernel: Callable[..., None], missing: tuple[int, ...]) -> None:
    lists = [[] if index in missing else held for index, held in enumerate(lists_of([700], torch.float32, 0.1))]
    check(kernel, numbers(), None if 3 in missing else shares_of(), lists)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("last", [STEP - 1, STEP - 102_400, STEP - 2**30, STEP, STEP + 7], ids=["1", "longest", "longer", "0", "negative"])
def test_gaps(kernel: Callable[..., None], last: int) -> None:
    """A gap outside of the table counts as its first or its last; one of 1 changes nothing."""
    lists = lists_of([300], torch.float32, 1.0)
    lists[4][0].fill_(last)
    shares = shares_of()
    second, _ = check(kernel, numbers(), shares, lists)[3:]
    assert shares.numel() == 102_401
    share = 0.0 if last >= STEP - 1 else ((1 - 0.99**102_400) / 102_400 - 0.01) / 0.99
    torch.testing.assert_close(second[0], lists[3][0] + share * lists[0][0].square())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_and_denormal_ones(kernel: Callable[..., None], dtype: torch.dtype) -> None:
    lists = lists_of([100], dtype, 0.5)
    smallest = torch.finfo(dtype).smallest_normal
    lists[0][0][:8] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, smallest / 4, -smallest / 2, 6e4, -6e4]).to(dtype)
    check(kernel, numbers(), shares_of(dtype), lists)
    check(kernel, numbers(factor=1e30), shares_of(dtype), [lists[0], [], *lists[2:]])


def views(dtype: torch.dtype) -> dict[str, Lists]:
    """Returns tensors of strides of their own: dense and alike, alike with gaps, and those of the gradient unlike the others."""
    channels_last = [[t.to(memory_format=torch.channels_last) for t in held] for held in lists_of([(3, 5, 7, 9)], dtype, 0.2)]
    transposed = [[t.t() for t in held] for held in lists_of([(30, 40)], dtype, 0.2)]
    with_gaps = [[t[:, ::2] for t in held] for held in lists_of([(30, 40)], dtype, 0.2)]
    grads, *others = lists_of([(30, 40)], dtype, 0.2)
    unlike = [[grad.t().contiguous().t() for grad in grads], *others]
    return {"channels_last": channels_last, "transposed": transposed, "with gaps": with_gaps, "unlike": unlike}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", views(torch.float32))
def test_strides(kernel: Callable[..., None], name: str) -> None:
    lists = views(torch.bfloat16)[name]
    contiguous = [[tensor.contiguous() for tensor in held] for held in lists]
    found, expected = check(kernel, numbers(decay=0.1), shares_of(), lists), check(kernel, numbers(decay=0.1), shares_of(), contiguous)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_dtypes_that_no_kernel_knows(kernel: Callable[..., None]) -> None:
    lists = lists_of([700], torch.float64, 0.1)
    scalars, shares = numbers(decay=0.1).double(), spread_shares(0.99, 1e-16, torch.float64, torch.device("cpu"))
    check(kernel, scalars, shares, lists)
    mixed = [held if index < 2 else [t.float() if t.is_floating_point() else t for t in held] for index, held in enumerate(lists)]
    check(kernel, numbers(decay=0.1), shares_of(), mixed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_many_parameters_by_several_threads(dtype: torch.dtype) -> None:
    """Large enough for first moments that are written past the caches; one of them does not start at the begin of a cache line."""
    if load_library() is None:
        pytest.skip("no C++ compiler")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        lists = lists_of([*[5000] * 20, 2**22 + 77, 1000], dtype, 0.01)
        lists[2][0] = torch.zeros(5003, dtype=dtype)[3:]
        check(prepare_moments_cpu, numbers(), shares_of(dtype), [lists[0], [], *lists[2:]])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("beta2", [0.5, 0.95, 0.999, 0.99999])
def test_a_share_leaves_a_step_with_the_weight_of_its_gap(beta2: float) -> None:
    shares = spread_shares(beta2, 2.0**-23, torch.float64, torch.device("cpu"))
    gap = torch.arange(1, shares.numel(), dtype=torch.float64)
    torch.testing.assert_close(beta2 * shares[1:] + (1 - beta2), (1 - beta2**gap) / gap, rtol=1e-7, atol=0)
    assert shares.numel() - 1 == min(math.ceil(1024 / (1 - beta2)), 2**20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_second_moment_of_few_bits_stays_positive(dtype: torch.dtype) -> None:
    """However long an element has waited: the for-loop rounds at every operation."""
    parameter = nn.Parameter(torch.ones(4096, dtype=dtype))
    optimizer = Adam([parameter], betas=(0.9, 0.95), eps=1e-3, foreach=False)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]
    parameter.grad = torch.linspace(0.01, 10, 4096).to(dtype)
    last = torch.full((4096,), -(2**22), dtype=torch.int32)
    preparation = Preparation(optimizer)
    preparation.add(parameter, optimizer.param_groups[0], 2, None, (state["exp_avg_sq"], last))
    preparation.run()
    optimizer.step()
    assert (state["exp_avg_sq"] >= 0).all()
    assert parameter.isfinite().all()


def test_opcheck() -> None:
    lists = lists_of([5, (2, 3)], torch.float32, 0.5)
    torch.library.opcheck(prepare_moments, (numbers(), shares_of(beta2=0.5), *lists))


def test_versions_stay() -> None:
    lists = lists_of([5], torch.float32, 0.5)
    for kernel in (prepare_moments_reference, prepare_moments):
        versions = [[tensor._version for tensor in held] for held in lists]
        kernel(numbers(), shares_of(), *lists)
        assert [[tensor._version for tensor in held] for held in lists] == versions


def test_parameters_with_the_same_numbers_are_prepared_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[float], list[int]]] = []

    def record(scalars: Tensor, shares: Tensor | None, *lists: list[Tensor]) -> None:
        calls.append((scalars.tolist(), [len(held) for held in lists]))

    monkeypatch.setattr("dct_compile.moments.prepare_moments", record)
    held = [nn.Parameter(torch.ones(3)) for _ in range(5)]
    groups: list[dict[str, Any]] = [{"params": held[:3]}, {"params": held[3:], "weight_decay": 0.25, "maximize": True}]
    optimizer = Adam(groups)
    preparation = Preparation(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones(3)
            second = (torch.zeros(3), torch.zeros(3, dtype=torch.int32)) if parameter is held[0] else None
            preparation.add(parameter, group, 2.0, (torch.zeros(3), 0.5), second)
    assert calls == []
    preparation.run()
    assert calls == [
        ([0.5, 1.0, 0.0, 2.0, 0.0], [1, 0, 1, 1, 1]),
        ([0.5, 1.0, 0.0, 2.0, 0.0], [2, 0, 2, 0, 0]),
        ([0.5, -1.0, 0.25, 2.0, 0.0], [2, 2, 2, 0, 0]),
    ]


def test_a_step_that_a_fused_optimizer_leaves_out_changes_no_moment() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter], fused=True)
    parameter.grad = torch.tensor([1.0, math.inf, 0.0])
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(4.0)  # type: ignore[attr-defined]
    first, second, last = torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.int32)
    preparation = Preparation(optimizer)
    preparation.add(parameter, optimizer.param_groups[0], 9.0, (first, 0.5), (second, last))
    preparation.run()
    assert torch.equal(first, torch.ones(3))
    assert torch.equal(second, torch.ones(3))
    assert torch.equal(last, torch.ones(3, dtype=torch.int32))
