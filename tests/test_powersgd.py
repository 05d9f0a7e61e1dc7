"""PowerSGD: equal to torch's own hook, and what its factors do with gradients that are zero."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, _should_compress, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.config import DCTConfig
from dct_compile.integrations.ddp import DDPIntegration
from dct_compile.runtime import RUNTIME
from dct_compile.schemes.powersgd import PowerSGD
from dct_compile.state.bucket import BucketState
from tests.rank_pool import RankPool
from tests.ranks import fresh_compiler
from tests.ranks_ddp import batch, loss_of
from tests.side_by_side import SideBySide, decide_shapes
from tests.test_suspended import InstantComm

SHAPES = {"first": (30, 20), "bias": (20,), "second": (8, 5, 3, 3)}


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_the_same_parameters_are_compressed_as_by_torchs_hook(rank: int) -> None:
    sizes = [1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24, 32, 48, 64]
    shapes: dict[str, tuple[int, ...]] = {f"{rows}x{columns}": (rows, columns) for rows in sizes for columns in sizes}
    shapes |= {"vector": (1000,), "kernel": (8, 2, 3, 3), "border": (4 * rank, 4 * rank)}
    offer = decide_shapes({"large": (500, 500), **shapes}, gradient_scheme="powersgd", rank=rank, min_numel=0).offer
    assert isinstance(offer, PowerSGD)
    compressed = {segment.parameter.name for segment in offer.members.compressed}
    matrices = {name: (shape[0], torch.Size(shape).numel() // shape[0]) for name, shape in shapes.items()}
    wanted = {name for name, (n, m) in matrices.items() if _should_compress(n, m, min(n, m, rank), 2)[0]}
    assert compressed - {"large"} == wanted
    assert "border" not in compressed, "factors of exactly half the size"


def test_offer() -> None:
    decision = decide_shapes(SHAPES, ranks=4, gradient_scheme="powersgd", rank=2)
    assert (decision.scheme, decision.reason) == ("powersgd", "powersgd, rank 2; dense: bias")
    assert decision.wire_bytes == int(1.5 * 4 * 2 * (30 + 20 + 8 + 45)) + int(1.5 * 4 * 20)
    assert decision.digest == "powersgd: rank 2 of 2 matrices"
    assert decision.offer.state.sent == (100, 106)  # type: ignore[union-attr]
    whole = decide_shapes({"first": (30, 20)}, gradient_scheme="powersgd", rank=2)
    assert whole.reason == "powersgd, rank 2"


@pytest.mark.parametrize(
    ("shapes", "options", "reason"),
    [
        ({"bias": (500,)}, {}, "a vector has no low-rank factors"),
        ({"scale": ()}, {"min_numel": 0}, "a vector has no low-rank factors"),
        ({"empty": (0, 0)}, {"min_numel": 0}, "factors of rank 1 are at least half of a 0 x 0 matrix"),
        ({"small": (16, 16)}, {"rank": 4}, "factors of rank 4 are at least half of a 16 x 16 matrix"),
        ({"weight": (30, 20)}, {"exempt": ["w*"]}, "exempt by pattern 'w*'"),
        ({"weight": (30, 20)}, {"min_numel": 601}, "fewer than min_numel=601 elements"),
        ({"weight": (30, 20)}, {"unused": True}, "powersgd cannot leave out a parameter for one step, as find_unused_parameters asks"),
    ],
)
def test_left_dense(shapes: dict[str, tuple[int, ...]], options: dict[str, Any], reason: str) -> None:
    decision = decide_shapes(shapes, gradient_scheme="powersgd", **options)
    assert (decision.scheme, decision.reason) == ("dense", reason)


def test_a_backward_under_autocast_changes_no_product() -> None:
    offer = decide_shapes(SHAPES, ranks=2, gradient_scheme="powersgd", rank=2).offer
    assert isinstance(offer, PowerSGD)
    start = BucketState([], offer.state, torch.device("cpu")).tensors
    grad = torch.randn(offer.members.numel, generator=torch.Generator().manual_seed(0))

    def reduced(autocast: bool) -> list[Tensor]:
        state = {name: tensor.clone() for name, tensor in start.items()}
        with torch.autocast("cpu", enabled=autocast):
            return [offer.reduce(grad, state, InstantComm("", 2)), *state.values()]

    torch.testing.assert_close(reduced(True), reduced(False), rtol=0, atol=0)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_gradient_of_low_rank_is_sent_as_it_is(rank: int) -> None:
    side = SideBySide({"weight": (30, 20)}, gradient_scheme="powersgd", rank=rank)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(30, rank, generator=generator) @ torch.randn(rank, 20, generator=generator)
    results = side.step([grad.flatten(), 3 * grad.flatten()])
    torch.testing.assert_close(results[0], 2 * grad.flatten(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(side.residuals(), [-grad.flatten(), grad.flatten()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("part", ["all", "first row and column zero", "rows add up to zero"])
def test_factors_recover_from_a_gradient_of_zero(rank: int, part: str) -> None:
    """A basis of unit vectors would see nothing of the second, a basis of ones nothing of the third."""
    side = SideBySide({"weight": (30, 20)}, gradient_scheme="powersgd", rank=rank)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, rank, generator=generator) @ torch.randn(rank, 20, generator=generator)
    if part == "first row and column zero":
        matrix[:2], matrix[:, :2] = 0, 0
    elif part == "rows add up to zero":
        matrix -= matrix.mean(0)
        matrix -= matrix.mean(1, keepdim=True)
    for _ in range(2):
        for result in side.step([torch.zeros(600)] * 2):
            assert not result.any()
    assert not any(state.tensors["right_factor"].any() for state in side.states)
    for _ in range(2):
        results = side.step([matrix.flatten()] * 2)
    torch.testing.assert_close(results[0], matrix.flatten(), rtol=1e-3, atol=1e-3)


def test_a_later_step_follows_the_direction_of_the_steps_before() -> None:
    """Warm start: what one power iteration cannot find, several do."""
    side = SideBySide({"weight": (30, 20)}, gradient_scheme="powersgd", error_feedback=False)
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(30, 20, generator=generator), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(1, 0.1, 20) ** 2) @ v
    best = torch.outer(u[:, 0], v[0])
    errors = [float((side.step([matrix.flatten()] * 2)[0].view(30, 20) - best).norm()) for _ in range(40)]
    assert errors[0] > 0.3
    assert errors[-1] < 0.03


class Mixed(nn.Module):
    """Matrices that are compressed, one that is too small, a kernel of four dimensions, and vectors between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom, self.kernel = nn.Linear(16, 64), nn.Conv1d(4, 24, 5, padding=2)
        self.middle, self.small, self.top = nn.Linear(24 * 16, 32), nn.Linear(32, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.kernel(torch.tanh(self.bottom(x)).view(len(x), 4, 16))
        result: Tensor = self.top(self.small(torch.tanh(self.middle(h.flatten(1)))))
        return result


class Recorder:
    """torch's hook; ``first_factors`` are those that it draws when it begins to compress, by the number of the parameter."""

    def __init__(self, rank: int, model: nn.Module) -> None:
        self.state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        self.numbers = {id(parameter): number for number, parameter in enumerate(model.parameters())}
        self.first_factors: dict[int, Tensor] = {}
        self.parameters: list[Tensor] = []
        """Those of the bucket, in order."""

    @staticmethod
    def hook(recorder: "Recorder", bucket: GradBucket) -> torch.futures.Future[Tensor]:
        if recorder.state.iter == 2:
            recorder.draw(bucket)
        return powerSGD_hook(recorder.state, bucket)

    def draw(self, bucket: GradBucket) -> None:
        """Draws as the hook does: one seed for each bucket, then the factors in the order of the shapes."""
        random = np.random.RandomState()
        random.set_state(self.state.rng.get_state())
        by_shape: dict[tuple[int, int], list[int]] = {}
        self.parameters = bucket.parameters()
        for parameter in bucket.parameters():
            rows, columns = parameter.shape[0], parameter.numel() // parameter.shape[0]
            rank = min(rows, columns, self.state.matrix_approximation_rank)
            if _should_compress(rows, columns, rank, 2)[0]:
                by_shape.setdefault((rows, columns), []).append(self.numbers[id(parameter)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.randint(1_000_000_000))
            for (_, columns), numbers in by_shape.items():
                for number in numbers:
                    self.first_factors[number] = torch.randn(1, columns, self.state.matrix_approximation_rank).flatten()


def side_by_side_with_torch(rank: int, world_size: int, ranks_of_factors: list[int]) -> list[dict[str, Any]]:
    results = []
    for factor_rank in ranks_of_factors:
        for cap in (25, 0.02):  # MB: one bucket, and several
            with fresh_compiler():
                results.append(compare_with_torch(rank, factor_rank, cap))
    return results


def compare_with_torch(rank: int, factor_rank: int, cap: float) -> dict[str, Any]:
    theirs = DistributedDataParallel(Mixed())  # with several buckets, the collectives of torch's hook come in any order
    recorder = Recorder(factor_rank, theirs)
    theirs.register_comm_hook(recorder, Recorder.hook)
    their_optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> list[Tensor]:
        optimizer.zero_grad()
        loss_of(module(batch(rank, number))).backward()
        gradients = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
        optimizer.step()
        return gradients

    for number in range(2):
        step(theirs, their_optimizer, number)
    start = {name: value.clone() for name, value in theirs.module.state_dict().items()}
    found = {"gradient": 0.0, "parameter": 0.0, "residual": 0.0}
    gradients = [step(theirs, their_optimizer, 2)]

    model = Mixed()
    model.load_state_dict(start)
    ours = DistributedDataParallel(model, bucket_cap_mb=cap)
    config = DCTConfig(gradient_scheme="powersgd", rank=factor_rank, min_numel=0)
    DDPIntegration().attach(ours, config, RUNTIME)  # as a compilation does, which would take longer than all steps
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    names = [name for name, _ in model.named_parameters()]
    numels = [parameter.numel() for parameter in model.parameters()]
    dct_compile.load_state_dict(
        ours,
        {
            names[number]: {
                "residual": torch.zeros(numels[number]),
                "right_factor": factor,
                "counters": torch.zeros(4, dtype=torch.int64),
            }
            for number, factor in recorder.first_factors.items()
        },
    )
    for number in range(2, 10):
        if number > 2:
            gradients.append(step(theirs, their_optimizer, number))
        for mine, other in zip(step(ours, optimizer, number), gradients[-1], strict=True):
            found["gradient"] = max(found["gradient"], float((mine - other).abs().max() / other.abs().max()))
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            found["parameter"] = max(found["parameter"], float((mine - other).detach().abs().max()))
    saved = dct_compile.state_dict(ours)
    (errors,) = recorder.state.error_dict.values()
    for parameter, error in zip(recorder.parameters, errors.split([p.numel() for p in recorder.parameters]), strict=True):
        entry = saved.get(names[recorder.numbers[id(parameter)]])
        if entry is not None:
            found["residual"] = max(found["residual"], float((entry["residual"] - error).abs().max() / error.abs().max()))
    kept = min(float(entry["residual"].abs().max()) for entry in saved.values())
    compressed = sorted(names[number] for number in recorder.first_factors)
    buckets = sum(site.kind == "gradient" for site in dct_compile.report().sites)
    return {**found, "compressed": sorted(saved) == compressed, "names": compressed, "kept": kept, "buckets": buckets}


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "ranks_of_factors"), [(2, [1, 2, 4]), (3, [2])])
def test_equal_to_torchs_hook(rank_pool: RankPool, world_size: int, ranks_of_factors: list[int]) -> None:
    for results in rank_pool.run(world_size, side_by_side_with_torch, ranks_of_factors):
        assert len(results) == 2 * len(ranks_of_factors)
        for found in results:
            assert found["compressed"]
            assert found["names"][0] == "bottom.weight"
            assert "small.weight" not in found["names"]
            assert found["kept"] > 1e-3, "nothing was left out"
            assert found["gradient"] < 1e-4
            assert found["parameter"] < 1e-6
            assert found["residual"] < 2e-5
        assert [found["buckets"] > 1 for found in results] == [False, True] * len(ranks_of_factors)
