"""Training steps on slow links: dense, compressed, and the hooks of torch's DDP that users would take instead.

Each host is a network namespace of this machine (``slow_hosts.py``), so all of them share its cores. The step without communication is
timed on the same hosts, just before each cell. All results are appended to a file, and a cell that is there is not measured again,
unless it has failed.

    python benchmarks/slow_links.py --model gpt --hosts 2,4 --rates 100mbit,1gbit
    python benchmarks/slow_links.py --to-loss --model gpt-small --hosts 2 --rates 100mbit
"""

import json
import queue
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from slow_cells import METHODS, RATES, WORKLOADS, Cell, Result, ResultFile, methods_of
from slow_hosts import SlowHosts, SlowHostsError, missing
from slow_rank import ANSWER
from slow_tables import draw_losses, draw_steps, print_losses, print_steps
from slow_training import LossFile, to_loss

from dct_compile.bench.machine import circumstances

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "slow_links.csv"
LOSSES = RESULTS.with_name("slow_links_to_loss.csv")
ANSWER_S = 900
"""The longest wait for an answer: a compilation, or a cell of the slowest link."""


class Ranks:
    """The rank processes on ``hosts``, which answer commands."""

    def __init__(self, hosts: SlowHosts) -> None:
        self.hosts = hosts
        environment = {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self.processes = hosts.start([sys.executable, str(Path(__file__).parent / "slow_rank.py")], environment)
        self._lines: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        for rank in range(len(self.processes)):
            threading.Thread(target=self._read, args=(rank,), daemon=True).start()

    def ask(self, bits_per_s: float | None, **command: Any) -> list[dict[str, Any]]:
        """Sets the rate of the links, gives ``command`` to all ranks, and returns their answers.

        Raises:
            SlowHostsError: A rank has failed, has ended or does not answer. The processes are of no further use.
        """
        if bits_per_s != self.hosts.bits_per_s:
            self.hosts.set_rate(bits_per_s)
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(self.processes):
            try:
                rank, line = self._lines.get(timeout=ANSWER_S)
            except queue.Empty:
                raise SlowHostsError(f"no answer to {command} in {ANSWER_S} s") from None
            answers[rank] = json.loads(line) if line else {"error": "the process has ended"}
            if "error" in answers[rank]:
                raise SlowHostsError(f"rank {rank}: {answers[rank]['error']}")
        return [answers[rank] for rank in sorted(answers)]

    def _read(self, rank: int) -> None:
        output = self.processes[rank].stdout
        assert output is not None
        for line in output:
            if line.startswith(ANSWER):
                self._lines.put((rank, line.removeprefix(ANSWER)))
        self._lines.put((rank, ""))


@contextmanager
def ranks_on(hosts: int) -> Iterator[Ranks]:
    """Makes slow hosts without a limit and starts their ranks."""
    with SlowHosts(hosts, None) as slow:
        yield Ranks(slow)


def measure(cells: Sequence[Cell], seconds: float, file: ResultFile) -> None:
    """Measures ``cells`` of one model and number of hosts, and adds the results to ``file``.

    The cells of a method follow one another, because it is compiled for them. A failure costs its cell and a new start of the ranks.
    """
    left = list(cells)
    while left:
        with ranks_on(left[0].hosts) as ranks:
            built: tuple[str, int, str] | None = None
            while left:
                cell = left.pop(0)
                try:
                    if built != cell.build:
                        ranks.ask(cell.bits_per_s if cell.build[-1] else None, do="build", model=cell.model, method=cell.method)
                        built = cell.build
                    compute = ranks.ask(None, do="compute")
                    answers = ranks.ask(cell.bits_per_s, do="steps", seconds=seconds)
                    compute += ranks.ask(None, do="compute")
                    result = Result.of(answers, compute)
                except SlowHostsError as error:
                    result = Result(error=str(error))
                file.add(cell, result)
                print(f"{cell}: {result.error or f'{result.median_s:.4f} s'}", flush=True)
                if result.error:
                    break


def ordered(cells: Sequence[Cell], seed: int) -> list[Cell]:
    """Returns cells in random order, with those of one method and repetition together."""
    generator = random.Random(seed)
    place = {key: generator.random() for key in dict.fromkeys((cell.method, cell.repeat) for cell in cells)}
    return sorted(cells, key=lambda cell: (cell.repeat, place[cell.method, cell.repeat], generator.random()))


@click.command()
@click.option("--model", "models", default="gpt", help=f"Models, separated by semicolons: {'; '.join(WORKLOADS)}.")
@click.option("--hosts", default="2,4,8", help="Numbers of hosts.")
@click.option("--rates", default=",".join(RATES), help=f"Rates of the links: {', '.join(RATES)}.")
@click.option("--methods", default=";".join(METHODS), help=f"Methods, separated by semicolons: {'; '.join(METHODS)}.")
@click.option("--repeats", default=1, help="Measurements of each cell.")
@click.option("--seconds", default=10.0, help="Timed seconds of a cell; at least two steps are timed.")
@click.option("--seed", default=0, help="Of the order of the cells.")
@click.option("--results", type=click.Path(path_type=Path), help=f"The file of results. Default: {RESULTS.name}, {LOSSES.name}.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draws into this file; the name of the model is put before its end.")
@click.option("--to-loss", "loss_steps", is_flag=False, flag_value=300, type=int, help="Trains to the loss of so many dense steps (300).")
def main(
    models: str,
    hosts: str,
    rates: str,
    methods: str,
    repeats: int,
    seconds: float,
    seed: int,
    results: Path | None,
    picture: Path | None,
    loss_steps: int | None,
) -> None:
    """Prints a table for each model, and appends all results to a file."""
    chosen, sizes = listed(models, ";", WORKLOADS), [int(text) for text in hosts.split(",")]
    names, speeds = listed(methods, ";", METHODS), listed(rates, ",", RATES)
    lacking = missing()
    if lacking:
        raise click.ClickException("; ".join(lacking))
    print(circumstances())
    if loss_steps is not None:
        losses = LossFile(results or LOSSES)
        for model in chosen:
            for size in sizes:
                with ranks_on(size) as ranks:
                    to_loss(ranks.ask, model, size, speeds, methods_of(model, size, names), loss_steps, range(repeats), losses)
            print_losses(losses.read(), model)
            if picture is not None:
                draw_losses(losses.read(), model, picture.with_stem(f"{picture.stem}-{_plain(model)}"))
        return
    file = ResultFile(results or RESULTS)
    for model in chosen:
        for size in sizes:
            cells = [
                Cell(model, size, rate, name, repeat)
                for name in methods_of(model, size, names)
                for rate in speeds
                for repeat in range(repeats)
            ]
            known = file.read()
            measure(ordered([cell for cell in cells if cell not in known or known[cell].error], seed), seconds, file)
        print_steps(file.read(), model)
        if picture is not None:
            draw_steps(file.read(), model, picture.with_stem(f"{picture.stem}-{_plain(model)}"))


def listed(text: str, separator: str, known: dict[str, Any]) -> list[str]:
    """Returns the names in ``text``; one that is not in ``known`` is an error."""
    names = [name.strip() for name in text.split(separator)]
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(map(repr, known))}")
    return names


def _plain(model: str) -> str:
    return model.replace(", ", "-").replace(" ", "-")


if __name__ == "__main__":
    main()
