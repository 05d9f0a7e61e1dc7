"""What one rank of ``dct train`` does: for each backend compile once, then train and test with every seed."""

import logging
import os
import time
from dataclasses import asdict

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch._logging._internal import set_logs

from dct_compile.cli.methods import Compiled, compile_with, computed_bytes
from dct_compile.cli.progress import Progress
from dct_compile.cli.replicas import check_replicas
from dct_compile.cli.results import BackendResult, Results, Run, environment, gradient_density
from dct_compile.cli.settings import Settings
from dct_compile.link import ONE_MACHINE
from dct_compile.models.parallel import Mesh, average_sharded_gradients, make_mesh
from dct_compile.models.tasks import Batch, Task
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
        task = settings.task()
        results = [_train_backend(backend, settings, task, mesh) for backend in settings.backends]
        own = _own_link()
        if rank == 0:
            Results(settings.as_json(), {**environment(), "link": own}, list(task.metrics), results).save(settings.out)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _own_link() -> str:
    """Says which link the ranks really have, whatever was assumed. All ranks make this call."""
    assert dist.group.WORLD is not None
    found = RUNTIME.links.of(dist.group.WORLD, "auto")
    if found == ONE_MACHINE:
        return "all ranks are on one machine, where link='auto' leaves everything dense"
    return str(found) if found is not None else "one rank" if dist.get_world_size() == 1 else "not measured"


def _train_backend(backend: str, settings: Settings, task: Task, mesh: Mesh) -> BackendResult:
    model = task.build(mesh)
    # Activations of a model-parallel model are not known from its parameters.
    computed = computed_bytes(backend, model, mesh.dp) if mesh.mp == 1 else []
    trainer = Trainer(backend, settings, task, mesh, model, compile_with(backend, model, mesh, settings.options))
    runs = [trainer.run(seed) for seed in range(settings.seeds)]
    notes = list(RUNTIME.reports.snapshot().notes) if backend == "dct" else []
    return BackendResult(backend, runs, trainer.all_sites(), notes, computed)


def _postfix(loss: Tensor, numbers: dict[str, float]) -> dict[str, str]:
    """Returns what stands behind the progress: the loss, and a monitor's summary."""
    formats = {"density": "{:.4f}", "overflow": "{:.0f}", "compression": "{:.1f}x"}
    return {"loss": f"{loss.item():.4f}", **{name: formats[name].format(number) for name, number in numbers.items()}}


class Trainer:
    """Trains one model with one method, once for each seed."""

    def __init__(self, backend: str, settings: Settings, task: Task, mesh: Mesh, model: nn.Module, compiled: Compiled) -> None:
        self.backend, self.settings, self.task, self.mesh, self.model, self.compiled = backend, settings, task, mesh, model, compiled

    def run(self, seed: int) -> Run:
        """Trains from the initialisation of ``seed`` and tests; the compiled graphs are those of the seeds before."""
        self.compiled.module.train()
        self.task.reset(self.model, self.mesh, seed)
        self.compiled.restart()
        steps = self.settings.steps_of(self.task, seed)
        optimizer, schedule = self.settings.optimization_for(self.backend).start(self.model.parameters(), steps)
        losses: list[Tensor] = []
        seconds: list[float] = []
        density: list[tuple[int, float]] = []
        title = f"{self.backend}, seed {seed}"
        with Progress(steps, title, shown=dist.get_rank() == 0) as progress, Monitor(DENSITY_EVERY, RUNTIME) as monitor:
            for step, batch in enumerate(self.task.batches(seed, steps, self.mesh), start=1):
                start = time.perf_counter()
                losses.append(self._step(batch, optimizer))
                schedule.step()
                seconds.append(time.perf_counter() - start)
                monitor.step()
                progress.step(_postfix(losses[-1], monitor.summary() if self.backend == "dct" else {}))
                if step % self.settings.check_every == 0 or step == steps:
                    check_replicas(self.model, self.mesh, f"{title}, step {step}")
                if self.backend == "dct" and (step % DENSITY_EVERY == 0 or step == steps):
                    achieved = gradient_density(self._sites())
                    if achieved is not None:
                        density.append((step, achieved))
        loss_curve = torch.stack(losses)
        dist.all_reduce(loss_curve, dist.ReduceOp.AVG)
        metrics = self.task.test(self.model, self.compiled.module, seed, self.mesh)
        run = Run(
            seed=seed,
            metrics=metrics,
            steps=steps,
            seconds=seconds[WARMUP_STEPS:] or seconds[-1:],
            losses=loss_curve.tolist(),
            density=density,
            replica_checks=-(-steps // self.settings.check_every),
        )
        if dist.get_rank() == 0:
            numbers = ", ".join(f"{metric.title} {metrics[metric.name]:.4f}" for metric in self.task.metrics)
            click.echo(f"{title}: {numbers}, {run.steps_per_second:.1f} steps/s")
        return run

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> Tensor:
        loss = self.task.loss(self.compiled.module, batch)
        optimizer.zero_grad()
        loss.backward()
        average_sharded_gradients(self.model, self.mesh.mp)
        optimizer.step()
        return loss.detach()

    def _sites(self) -> list[SiteReport]:
        """Returns the sites of a training step. The graph for testing is not part of it."""
        return [site for site in RUNTIME.reports.snapshot().sites if site.training and site.calls] if self.backend == "dct" else []

    def all_sites(self) -> list[list[dict[str, object]]]:
        """Returns the sites of every rank, by rank; on rank 0."""
        gathered: list[list[dict[str, object]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, [asdict(site) for site in self._sites()])
        return gathered
