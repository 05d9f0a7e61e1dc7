"""What one rank of ``dct train`` does: for each backend compile once, then train and test with every seed."""

import logging
import os
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch._logging._internal import set_logs
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from dct_compile.cli.replicas import check_replicas
from dct_compile.cli.results import BackendResult, Results, Run, environment, gradient_density
from dct_compile.cli.settings import Settings
from dct_compile.models.datasets import Samples, batches
from dct_compile.models.dlrm import DLRM
from dct_compile.models.metrics import auc, log_loss
from dct_compile.models.parallel import Mesh, average_sharded_gradients, make_mesh, wrap_data_parallel
from dct_compile.monitor import Monitor
from dct_compile.report import SiteReport
from dct_compile.runtime import RUNTIME
from dct_compile.workarounds.gloo import shorten_names

WARMUP_STEPS = 10
"""Steps at the start of a run that do not count for its speed: the first one of a backend compiles."""
DENSITY_EVERY = 10


def work(rank: int, settings: Settings, port: int | None) -> None:
    """Trains as rank ``rank``; rank 0 writes the results to ``settings.out``.

    ``port``: of the store on this machine where the ranks meet; ``None`` under torchrun. Raises ``ReplicaMismatch`` on all ranks.
    """
    torch.set_num_threads(1)
    shorten_names()
    if "TORCH_LOGS" not in os.environ:
        set_logs(dynamo=logging.ERROR)
    if port is None:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=TCPStore("127.0.0.1", port, is_master=False), rank=rank, world_size=settings.world_size)
    try:
        mesh = make_mesh(settings.dp, settings.mp)
        results = [_train_backend(backend, settings, mesh) for backend in settings.backends]
        if rank == 0:
            Results(settings.as_json(), environment(), results).save(settings.out)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _train_backend(backend: str, settings: Settings, mesh: Mesh) -> BackendResult:
    data = settings.load(0)
    model = DLRM(data.dense_features, data.tables, mesh.mp_group)
    wrapped = wrap_data_parallel(model, mesh)
    if backend == "dct":
        compiled = torch.compile(wrapped, backend="dct", options=settings.options)
    else:
        compiled = torch.compile(wrapped, backend="inductor")
    assert isinstance(compiled, nn.Module)
    trainer = _Trainer(backend, settings, mesh, model, compiled)
    runs = [trainer.run(seed) for seed in range(settings.seeds)]
    return BackendResult(backend, runs, trainer.all_sites(), list(RUNTIME.reports.snapshot().notes) if backend == "dct" else [])


def _postfix(loss: Tensor, numbers: dict[str, float]) -> dict[str, str]:
    """What stands behind the progress bar: the loss, and a monitor's summary."""
    formats = {"density": "{:.4f}", "overflow": "{:.0f}", "compression": "{:.1f}x"}
    return {"loss": f"{loss.item():.4f}", **{name: formats[name].format(number) for name, number in numbers.items()}}


class _Trainer:
    def __init__(self, backend: str, settings: Settings, mesh: Mesh, model: DLRM, compiled: nn.Module) -> None:
        self.backend, self.settings, self.mesh, self.model, self.compiled = backend, settings, mesh, model, compiled

    def run(self, seed: int) -> Run:
        """Trains from the initialisation of ``seed`` and tests; the compiled graphs are those of the seeds before."""
        data = self.settings.load(seed)
        self.compiled.train()
        self.model.reset_parameters(seed)
        if self.backend == "dct":
            RUNTIME.states.load_state_dict(self.model, {})
        optimizer = torch.optim.Adagrad(self.model.parameters(), lr=self.settings.lr, fused=True)
        losses: list[Tensor] = []
        seconds: list[float] = []
        density: list[tuple[int, float]] = []
        steps = len(data.train) // self.settings.batch_size * self.settings.epochs
        title = f"{self.backend}, seed {seed}"
        bar = tqdm(total=steps, desc=title, disable=None if dist.get_rank() == 0 else True, mininterval=0.5)
        with closing(bar), Monitor(DENSITY_EVERY, RUNTIME) as monitor:
            for step, batch in enumerate(self._batches(data.train, seed), start=1):
                start = time.perf_counter()
                losses.append(self._step(batch, optimizer))
                seconds.append(time.perf_counter() - start)
                monitor.step()
                bar.set_postfix(_postfix(losses[-1], monitor.summary() if self.backend == "dct" else {}), refresh=False)
                bar.update()
                if step % self.settings.check_every == 0 or step == steps:
                    check_replicas(self.model, self.mesh, f"{title}, step {step}")
                if self.backend == "dct" and (step % DENSITY_EVERY == 0 or step == steps):
                    achieved = gradient_density(self._sites())
                    if achieved is not None:
                        density.append((step, achieved))
        loss_curve = torch.stack(losses)
        dist.all_reduce(loss_curve, dist.ReduceOp.AVG)
        logits = self._predict(data.test).numpy()
        labels = data.test.labels.numpy()
        run = Run(
            seed=seed,
            auc=auc(logits, labels),
            log_loss=log_loss(logits, labels),
            steps=steps,
            seconds=seconds[WARMUP_STEPS:] or seconds[-1:],
            losses=loss_curve.tolist(),
            density=density,
            replica_checks=-(-steps // self.settings.check_every),
        )
        if dist.get_rank() == 0:
            tqdm.write(f"{title}: test log-loss {run.log_loss:.4f}, AUC {run.auc:.4f}, {run.steps_per_second:.1f} steps/s")
        return run

    def _batches(self, samples: Samples, seed: int) -> Iterable[Samples]:
        for epoch in range(self.settings.epochs):
            yield from batches(samples, self.settings.batch_size, seed=seed * 1000 + epoch)

    def _own(self, batch: Samples) -> Samples:
        """What this rank's model-parallel group sees of a batch."""
        rows = len(batch) // self.mesh.dp
        return batch.take(torch.arange(self.mesh.dp_rank * rows, (self.mesh.dp_rank + 1) * rows))

    def _step(self, batch: Samples, optimizer: torch.optim.Optimizer) -> Tensor:
        own = self._own(batch)
        logits = self.compiled(own.dense, own.ids)
        loss = binary_cross_entropy_with_logits(logits, own.labels)
        optimizer.zero_grad()
        loss.backward()
        average_sharded_gradients(self.model, self.mesh.mp)
        optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def _predict(self, samples: Samples) -> Tensor:
        """Logits [N] of all samples, on every rank, from the compiled model. The last batch is filled up by starting over."""
        self.compiled.eval()
        size = self.settings.batch_size
        count = -(-len(samples) // size)
        order = torch.arange(count * size) % len(samples)
        parts = []
        for index in order.split(size):
            own = self._own(samples.take(index))
            parts.append(self.compiled(own.dense, own.ids))
        own_logits = torch.stack(parts)
        gathered = [torch.empty_like(own_logits) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own_logits)
        # The ranks of one model-parallel group computed the same samples.
        return torch.cat(gathered[:: self.mesh.mp], dim=1).flatten()[: len(samples)]

    def _sites(self) -> list[SiteReport]:
        """Returns the sites of a training step. The graph for testing is not part of it."""
        return [site for site in RUNTIME.reports.snapshot().sites if site.training and site.calls] if self.backend == "dct" else []

    def all_sites(self) -> list[list[dict[str, object]]]:
        """Returns the sites of every rank, by rank; on rank 0."""
        gathered: list[list[dict[str, object]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, [asdict(site) for site in self._sites()])
        return gathered
