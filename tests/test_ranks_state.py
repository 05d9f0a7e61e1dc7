"""A run that is saved and continued elsewhere is, to the bit, the run that was never interrupted."""

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.ranks import digest, fresh_compiler, run_ranks


class Recommender(nn.Module):
    """An embedding exchange, an exchange of activations, and layers enough for several buckets."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(40, 16)
        self.bottom, self.middle, self.top = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, ids: Tensor) -> Tensor:
        vectors = funcol.all_to_all_single_autograd(self.table(ids), None, None, dist.group.WORLD)
        h = funcol.all_to_all_single_autograd(torch.relu(self.bottom(vectors)), None, None, dist.group.WORLD)
        return self.top(torch.relu(self.middle(h)))


class Run:
    """A model in training, with its optimizer."""

    def __init__(self, options: dict[str, Any], ddp: bool, seed: int) -> None:
        model = Recommender(seed)
        self.module: nn.Module = DistributedDataParallel(model, bucket_cap_mb=0.004) if ddp else model
        self.compiled = torch.compile(self.module, backend=dct, options=options)
        self.optimizer = torch.optim.Adagrad(self.module.parameters(), lr=0.05)

    def steps(self, rank: int, steps: range) -> None:
        for step in steps:
            ids = torch.randint(0, 40, (8,), generator=torch.Generator().manual_seed(10 * step + rank))
            self.optimizer.zero_grad()
            self.compiled(ids).square().mean().backward()
            self.optimizer.step()

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save((self.module.state_dict(), self.optimizer.state_dict(), dct_compile.state_dict(self.module)), file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        model, optimizer, compressor = torch.load(io.BytesIO(saved), weights_only=True)
        self.module.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        dct_compile.load_state_dict(self.module, compressor)

    def digest(self) -> str:
        state = dct_compile.state_dict(self.module)
        parts = [tensor for name in sorted(state) for stage in (state[name], state[name].get("owner", {})) for tensor in tensors_of(stage)]
        return digest([*self.module.parameters(), *parts])


def tensors_of(stage: dict[str, Any]) -> list[Tensor]:
    return [value for _, value in sorted(stage.items()) if isinstance(value, Tensor)]


VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "ddp gather": ({"all_reduce": "gather"}, True),
    "ddp owner": ({"all_reduce": "owner"}, True),
    "data_parallel gather": ({"all_reduce": "gather", "data_parallel": True}, False),
    "data_parallel owner": ({"all_reduce": "owner", "data_parallel": True}, False),
}


def interrupted(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, (options, ddp) in VARIANTS.items():
        options = {"dp_density": 0.05, "mp_density": 0.25, "refresh_interval": 4, **options}
        # Buckets of less than 1 MB: Dynamo must not split its graphs at them.
        with fresh_compiler(), torch._dynamo.config.patch(optimize_ddp=False):
            unbroken = Run(options, ddp, seed=0)
            unbroken.steps(rank, range(3))
            saved = unbroken.save()
            at_save = unbroken.digest()
            unbroken.steps(rank, range(3, 6))
            expected = unbroken.digest()
            # The same objects go back three steps: state that is in use is overwritten.
            unbroken.load(saved)
            restored_in_place = unbroken.digest()
            unbroken.steps(rank, range(3, 6))
            in_place = unbroken.digest()
        with fresh_compiler(), torch._dynamo.config.patch(optimize_ddp=False):
            # Another model, before its first compilation: its state is not there yet, and DDP's buckets have not been rebuilt.
            resumed = Run(options, ddp, seed=1)
            resumed.load(saved)
            before_use = resumed.digest()
            resumed.steps(rank, range(3, 6))
            results[name] = (at_save, restored_in_place, before_use), (expected, in_place, resumed.digest())
            residuals = dct_compile.state_dict(resumed.module)
            sites = {(site.kind, site.decision) for site in dct_compile.report().sites}
            results[f"{name} sites"] = sites, sorted(residuals), sum(entry["residual"].abs().sum().item() for entry in residuals.values())
            resumed.steps(rank, range(1))
            dct_compile.load_state_dict(resumed.module, {})
            state = dct_compile.state_dict(resumed.module)
            assert not any(entry["residual"].any() or entry["counters"].any() for entry in state.values()), "an empty dict resets the state"
    return results


@pytest.mark.distributed
def test_a_resumed_run_equals_the_one_that_went_on() -> None:
    for results in run_ranks(interrupted, 2):
        for name in VARIANTS:
            at_save, after = results[name]
            assert len(set(at_save)) == 1, f"{name}: what was loaded is not what was saved"
            assert len(set(after)) == 1, f"{name}: (unbroken, restored in place, resumed) differ: {after}"
            assert at_save[0] != after[0]
            sites, compressed, residual = results[f"{name} sites"]
            assert {decision for _, decision in sites} == {"compressed"}, sites
            assert {"embedding", "embedding_gradient", "activation", "activation_gradient", "gradient"} == {kind for kind, _ in sites}
            assert compressed == ["bottom.weight", "middle.weight", "table.weight", "top.weight"]
            assert residual > 0
