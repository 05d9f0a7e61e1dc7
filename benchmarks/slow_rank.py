"""One rank of a measurement on slow links: reads commands, one JSON object a line, and answers each in a line of its own.

A process serves many cells, because its start and its compilations take longer than most of them. Between two commands nothing is sent,
so the rate of the links can be changed then.
"""

import gc
import itertools
import json
import logging
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from slow_cells import BUCKET_MIB, METHODS, ON_SHARED_HOSTS, WORKLOADS, measures_link
from slow_hosts import sent_bytes
from torch import Tensor
from torch._logging._internal import set_logs

import dct_compile
from dct_compile.cli.methods import POWERSGD_START, compile_with, computed_bytes
from dct_compile.integrations import INTEGRATIONS
from dct_compile.links import Links
from dct_compile.models.parallel import average_sharded_gradients, make_mesh
from dct_compile.models.tasks import Batch, Task
from dct_compile.report import SiteReport
from dct_compile.runtime import RUNTIME
from dct_compile.workarounds.gloo import shorten_names

ANSWER = "answer "
"""Begins the line of an answer; anything else that the process prints is none."""
WARMUP_STEPS = POWERSGD_START + 3
"""Steps after a compilation that are not timed. DDP builds its buckets in them, and torch's PowerSGD sends dense."""
MIDDLE = 1000
"""The number of a step in the middle of a training: the moments of Adam start anew in the first hundred."""
MOST_STEPS = 60
BATCHES = 8
WINDOW = 50
"""Steps whose mean loss is compared with the aim of a training."""
COMPUTE_S = 1.0
"""Seconds in which steps without communication are timed."""


class Training:
    """A compiled model with its optimizer."""

    def __init__(self, model: str, method: str) -> None:
        backend, options = (METHODS | ON_SHARED_HOSTS)[method]
        workload, ranks = WORKLOADS[model], dist.get_world_size()
        self.backend, self.mesh = backend, make_mesh(ranks // workload.mp, workload.mp)
        self.task: Task = workload.make(ranks)
        self.model = self.task.build(self.mesh)
        self.task.reset(self.model, self.mesh, seed=0)
        self.compiled = compile_with(backend, self.model, self.mesh, options, BUCKET_MIB.get(method))
        self.computed = computed_bytes(backend, self.model, ranks)[-1][1] if backend != "dct" and workload.mp == 1 else -1.0
        self._start(self.task.recipe.optimization.lr)
        self.batches: Iterator[Batch] = itertools.cycle(list(self.task.batches(0, BATCHES, self.mesh)))

    def step(self) -> Tensor:
        """Forward, backward, optimizer. Returns the loss."""
        loss = self.task.loss(self.compiled.module, next(self.batches))
        self.optimizer.zero_grad()
        loss.backward()
        average_sharded_gradients(self.model, self.mesh.mp)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def compute(self) -> dict[str, Any]:
        """Times steps in which DDP sends nothing."""
        with INTEGRATIONS[0].paused(self.compiled.module):
            steps = _steps_in(COMPUTE_S, _seconds(self.step), least=4)
            start = time.process_time()
            times = [_seconds(self.step) for _ in range(steps)]
            return {"times": times, "cpu_s": (time.process_time() - start) / steps}

    def time_steps(self, seconds: float) -> dict[str, Any]:
        """Times as many steps as fit into ``seconds``, two at least."""
        sent, times = _Sent(), [_seconds(self.step)]
        steps = _steps_in(seconds, times[0], least=2)
        if steps > 2:  # after a pause the first step is no step like others; it only counts where there are few
            sent, times = _Sent(), []
        times += [_seconds(self.step) for _ in range(steps - len(times))]
        return {
            "times": times,
            "cpu_s": sent.cpu_s() / steps,
            "sent_bytes": sent.bytes() / steps,
            "computed_bytes": self.computed_bytes(),
            "hops": sum(site.calls * site.hops for site in self.sites()) or 2 * (dist.get_world_size() - 1),
            "memory_bytes": sum(site.calls * site.memory_bytes for site in self.sites()),
        }

    def computed_bytes(self) -> float:
        """Returns the bytes that a rank sends in a step by the report, or computed from shapes; -1 where neither knows."""
        if self.backend != "dct":
            return self.computed
        return float(sum(site.calls * site.wire_bytes for site in self.sites()))

    def sites(self) -> list[SiteReport]:
        """Returns the collectives of a step, as far as the backend "dct" knows them."""
        return [site for site in dct_compile.report().sites if site.training] if self.backend == "dct" else []

    def train(self, rate: float, seed: int, steps: int, aim: float | None, every: int) -> list[tuple[int, float, float]]:
        """Trains anew at a learning rate, up to ``steps`` steps or until the mean loss of WINDOW steps is ``aim``.

        Returns:
            (step, seconds of all steps so far, mean loss of the last WINDOW steps over all ranks), after each ``every`` steps.
        """
        self.task.reset(self.model, self.mesh, seed)
        self.compiled.restart()
        self._start(rate)
        self.batches = self.task.batches(seed, steps, self.mesh)
        curve: list[tuple[int, float, float]] = []
        losses: deque[Tensor] = deque(maxlen=WINDOW)
        elapsed = 0.0
        for step in range(1, steps + 1):
            elapsed += _seconds(lambda: losses.append(self.step()))
            if step % every == 0 and step >= WINDOW:
                mean = torch.stack(list(losses)).mean()
                dist.all_reduce(mean, dist.ReduceOp.AVG)
                curve.append((step, elapsed, mean.item()))
                if aim is not None and mean <= aim:
                    break
        return curve

    def _start(self, rate: float) -> None:
        # A cosine would depend on the number of steps, which is not known for a training up to a loss.
        optimization = replace(self.task.recipe.optimization, lr=rate, schedule="constant")
        self.optimizer, self.schedule = optimization.start(self.model.parameters(), steps=1)


class Rank:
    """The commands. ``dense`` is the training whose steps without communication are timed, one for each model."""

    def __init__(self) -> None:
        self.dense: tuple[str, Training] | None = None
        self.training: Training | None = None

    def build(self, model: str, method: str) -> dict[str, Any]:
        """Compiles a model, in place of the one before, and trains it for WARMUP_STEPS."""
        self.training = None
        gc.collect()
        dct_compile.reset_report()
        if measures_link(method):
            # The rate is another one now. A link does not change for the product: graphs of the rate before would be used again.
            RUNTIME.links, self.dense = Links(), None
            torch._dynamo.reset()
        if self.dense is None or self.dense[0] != model:
            self.dense = (model, _warm(Training(model, next(iter(METHODS)))))
        self.training = _warm(Training(model, method))
        return {"numel": sum(parameter.numel() for parameter in self.training.model.parameters())}

    def compute(self) -> dict[str, Any]:
        assert self.dense is not None
        return self.dense[1].compute()

    def steps(self, seconds: float) -> dict[str, Any]:
        assert self.training is not None
        dist.barrier()
        return self.training.time_steps(seconds)

    def train(self, **arguments: Any) -> dict[str, Any]:
        assert self.training is not None
        return {"curve": self.training.train(**arguments)}


def _warm(training: Training) -> Training:
    training.step()
    for state in training.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(MIDDLE)
    for _ in range(WARMUP_STEPS - 1):
        training.step()
    return training


class _Sent:
    """Counts the bytes that this host sends, and the CPU time of its rank."""

    def __init__(self) -> None:
        dist.barrier()
        self.start, self.cpu_start = sent_bytes(), time.process_time()

    def cpu_s(self) -> float:
        return time.process_time() - self.cpu_start

    def bytes(self) -> int:
        dist.barrier()
        return sent_bytes() - self.start


def _steps_in(seconds: float, step_s: float, least: int) -> int:
    """Returns how many steps fit into ``seconds``, the same on all ranks. ``step_s``: those of one step on this rank."""
    slowest = torch.tensor(step_s, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return max(least, min(MOST_STEPS, int(seconds / slowest.item())))


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Answers commands until the input ends."""
    torch.set_num_threads(1)
    # Every method of a model runs the same code: each is a variant of it.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    set_logs(dynamo=logging.ERROR)
    shorten_names()
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    rank = Rank()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(rank, command.pop("do"))(**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
