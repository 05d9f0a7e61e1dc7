"""A run that is saved and continued elsewhere is, to the bit, the run that was never interrupted."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks import digest, fresh_compiler
from tests.small_models import exchange

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "in graph"]),
    pytest.mark.parametrize("scheme", ["gather", "owner"]),
]


class Recommender(nn.Module):
    """An embedding exchange, an exchange of activations, and layers enough for several buckets."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(40, 16)
        self.bottom, self.middle, self.top = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, ids: Tensor) -> Tensor:
        vectors = exchange(self.table(ids))
        h = exchange(torch.relu(self.bottom(vectors)))
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


WEIGHTS = ["bottom.weight", "middle.weight", "table.weight", "top.weight"]


@contextmanager
def run(scheme: str, ddp: bool, seed: int) -> Iterator[Run]:
    options = {"dp_density": 0.05, "mp_density": 0.25, "refresh_interval": 4, "gradient_scheme": scheme, "data_parallel": not ddp}
    # Buckets of less than 1 MB: Dynamo must not split its graphs at them.
    with fresh_compiler(), torch._dynamo.config.patch(optimize_ddp=False):
        yield Run(options, ddp, seed)


class Outcome(NamedTuple):
    """Digests: ``saved`` when saving, ``restored`` right after loading, ``expected`` three steps on without a break, ``got`` with one."""

    saved: str
    restored: str
    expected: str
    got: str


def restored_in_place(rank: int, world_size: int, scheme: str, ddp: bool) -> Outcome:
    """Takes the same objects back three steps: state that is in use is overwritten."""
    with run(scheme, ddp, seed=0) as training:
        training.steps(rank, range(3))
        file, saved = training.save(), training.digest()
        training.steps(rank, range(3, 6))
        expected = training.digest()
        training.load(file)
        restored = training.digest()
        training.steps(rank, range(3, 6))
        return Outcome(saved, restored, expected, training.digest())


def resumed(rank: int, world_size: int, scheme: str, ddp: bool) -> tuple[Outcome, set[tuple[str, str]], dict[str, float]]:
    """Loads into another model before its first compilation: it has no state yet, and DDP's buckets have not been rebuilt.

    Also returns its sites, and the sum of each parameter's residual.
    """
    with run(scheme, ddp, seed=0) as training:
        training.steps(rank, range(3))
        file, saved = training.save(), training.digest()
        training.steps(rank, range(3, 6))
        expected = training.digest()
    with run(scheme, ddp, seed=1) as training:
        training.load(file)
        restored = training.digest()
        training.steps(rank, range(3, 6))
        sites = {(site.kind, site.decision) for site in dct_compile.report().sites}
        state = dct_compile.state_dict(training.module)
        waiting = {name: state[name]["residual"].abs().sum().item() for name in sorted(state)}
        return Outcome(saved, restored, expected, training.digest()), sites, waiting


def test_what_is_loaded_in_place_is_what_was_saved(ranks2_once: Ranks, scheme: str, ddp: bool) -> None:
    for result in ranks2_once(restored_in_place, scheme, ddp):
        assert result.restored == result.saved


def test_a_run_restored_in_place_equals_the_one_that_went_on(ranks2_once: Ranks, scheme: str, ddp: bool) -> None:
    for result in ranks2_once(restored_in_place, scheme, ddp):
        assert result.got == result.expected != result.saved


def test_what_another_model_loads_is_what_was_saved(ranks2_once: Ranks, scheme: str, ddp: bool) -> None:
    for result, *_ in ranks2_once(resumed, scheme, ddp):
        assert result.restored == result.saved


def test_a_resumed_run_equals_the_one_that_went_on(ranks2_once: Ranks, scheme: str, ddp: bool) -> None:
    for result, *_ in ranks2_once(resumed, scheme, ddp):
        assert result.got == result.expected != result.saved


def test_a_resumed_run_compresses_everything(ranks2_once: Ranks, scheme: str, ddp: bool) -> None:
    for _, sites, waiting in ranks2_once(resumed, scheme, ddp):
        kinds = ("embedding", "embedding_gradient", "activation", "activation_gradient", "gradient")
        assert sites == {(kind, "compressed") for kind in kinds}
        assert list(waiting) == WEIGHTS
        assert sum(waiting.values()) > 0


def reset(rank: int, world_size: int, scheme: str, ddp: bool) -> tuple[bool, bool]:
    """Returns whether any state is not zero, before and after loading an empty one."""
    with run(scheme, ddp, seed=0) as training:
        training.steps(rank, range(2))
        before = holds_anything(training.module)
        dct_compile.load_state_dict(training.module, {})
        return before, holds_anything(training.module)


def holds_anything(module: nn.Module) -> bool:
    return any(bool(entry["residual"].any() or entry["counters"].any()) for entry in dct_compile.state_dict(module).values())


def test_an_empty_state_resets(ranks2: Ranks, scheme: str, ddp: bool) -> None:
    assert ranks2(reset, scheme, ddp) == [(True, False)] * 2
