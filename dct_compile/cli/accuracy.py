"""``dct bench accuracy``: what codecs of activations cost, by cut and model, each at its best learning rate, over seeds."""

import statistics
from collections.abc import Collection
from pathlib import Path

import click
from tabulate import tabulate

from dct_compile.cli.extras import require

RESULTS = Path("runs/activations.csv")
_POSITIVE = click.IntRange(min=1)


def _rates(ctx: click.Context, param: click.Parameter, text: str) -> list[float]:
    """Returns the numbers that ``text`` lists. Raises ``BadParameter`` for what is no number above 0."""
    rates = []
    for part in filter(None, text.split(",")):
        try:
            rates.append(float(part))
        except ValueError:
            rates.append(0.0)
        if not 0 < rates[-1] < float("inf"):
            raise click.BadParameter(f"{part!r} is not a number above 0", ctx, param)
    return rates


def _chosen(flag: str, text: str | None, known: Collection[str]) -> list[str]:
    """Returns the names that ``text`` lists, all without it. Raises ``click.UsageError`` for one that is not known."""
    names = list(known) if text is None else text.split(";")
    for name in names:
        if name not in known:
            raise click.UsageError(f"{flag}: {name!r} is none of {'; '.join(known)}")
    return names


@click.command()
@click.option("--steps", type=_POSITIVE, default=500, show_default=True, help="Steps of each run.")
@click.option("--seeds", type=_POSITIVE, default=3, show_default=True, help="Seeds of each codec at its best learning rate.")
@click.option("--cuts", help="What is cut, separated by semicolons; all without this option.")
@click.option("--codecs", help="Codecs, separated by semicolons; the first is the baseline. All without this option.")
@click.option("--rates", default="", callback=_rates, help="Learning rates, each tried with the first seed; by model without this option.")
@click.option("--samples", type=_POSITIVE, help="The first so many samples of each data set; all without this option.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="The file of results.", show_default=True)
def accuracy(steps: int, seeds: int, cuts: str | None, codecs: str | None, rates: list[float], samples: int | None, results: Path) -> None:
    """Train models whose activations are compressed where parallelisms would send them.

    Two simulated ranks in one process exchange what two real ones would, coded by the kernels of this project. The GPT learns Shakespeare
    byte by byte under AdamW, DLRM learns clicks of MovieLens-100k under Adagrad. Runs that the results hold are not made again.
    """
    require("tqdm")
    # Late, so that the help and usage errors do not wait for torch.
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from dct_compile.bench.activation_codecs import CODECS
    from dct_compile.bench.machine import circumstances
    from dct_compile.bench.record import Record
    from dct_compile.cli.accuracy_trainings import RATES, RUN, losses, task_of
    from dct_compile.cli.cut_models import CUTS
    from dct_compile.models.sources import MissingData

    cut_names, codec_names = _chosen("--cuts", cuts, CUTS), _chosen("--codecs", codecs, CODECS)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)  # DLRM's test gathers over it
    results.parent.mkdir(parents=True, exist_ok=True)
    record, rows = Record(results, RUN, ("loss",)), []
    try:
        for cut in cut_names:
            model, width, _ = CUTS[cut]
            task, base = task_of(model, samples), 0.0
            for number, codec in enumerate(codec_names):
                best, found = losses(record, task, cut, codec, rates or RATES[model], steps, seeds)
                mean, spread = statistics.mean(found), statistics.stdev(found) if seeds > 1 else 0.0
                base = base if number else mean
                rows.append([cut, codec, f"{CODECS[codec].ratio(width):.1f}", best, f"{mean:.4f} ± {spread:.4f}", f"{mean - base:+.4f}"])
    except MissingData as error:
        raise click.ClickException(str(error)) from error
    finally:
        dist.destroy_process_group()
    click.echo(f"Test loss after {steps} steps, {seeds} seeds, mean and standard deviation; {circumstances()}")
    click.echo(tabulate(rows, ["cut", "codec", "fewer bytes", "rate", "loss", "to the first"], disable_numparse=True))
