"""The measurements of ``dct bench kernels``."""

from pathlib import Path

import click
import torch

from dct_compile.bench.kernels import Bench, Measurement, MismatchError, Settings, plan
from dct_compile.bench.machine import circumstances, device_name
from dct_compile.bench.results import CsvFile, ops_table, step_overheads, steps_table
from dct_compile.bench.roofline import draw_roofline
from dct_compile.bench.timing import Stopwatch
from dct_compile.cli.progress import Progress
from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.build import load_library


def device_of(name: str | None) -> torch.device:
    """Returns the device to measure; an error where it is missing, or where its kernels are."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch finds no CUDA device")
    if device.type == "cuda" and not HAS_TRITON:
        raise click.ClickException("there is no Triton, so the ops run their slow references: nothing to measure")
    if device.type == "cpu" and load_library() is None:
        raise click.ClickException("the CPU kernels could not be compiled, so the ops run their slow references: nothing to measure")
    return device


def run(settings: Settings, target: Path, memory: str) -> None:
    """Measures, prints the tables, and writes ``target`` with the suffixes .csv and .png. ``memory``: how freed memory is kept."""
    stopwatch = Stopwatch(settings.device)
    with CsvFile(target.with_suffix(".csv"), settings.device, memory) as file:
        measurements = _measure(settings, stopwatch, file)
        steps = step_overheads(measurements)
        for step in steps:
            file.add_step(step)
    caption = circumstances() if settings.device.type == "cpu" else f"{device_name(settings.device)}, {circumstances()}"
    click.echo(caption)
    click.echo(ops_table(measurements))
    if steps:
        click.echo(f"\n{steps_table(steps)}")
    if not any(measured.timings for measured in measurements):
        raise click.ClickException("nothing was measured: no size fits into the memory that is free")
    target.with_suffix(".png").write_bytes(draw_roofline(measurements, caption))
    click.echo(f"\nWritten: {target}.csv, {target}.png")


def _measure(settings: Settings, stopwatch: Stopwatch, file: CsvFile) -> list[Measurement]:
    runner = Bench(stopwatch, settings.seconds, settings.inductor)
    measurements, cases = [], plan(settings)
    with Progress(len(cases), "measuring") as progress:
        for case, problem in cases:
            progress.retitle(f"{case.title(problem)}, {problem.numel} elements")
            try:
                measurements.append(runner.measure(case, problem))
            except MismatchError as error:
                raise click.ClickException(str(error)) from error
            file.add(measurements[-1])
            progress.step()
    return measurements
