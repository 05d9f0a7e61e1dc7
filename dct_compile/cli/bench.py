"""``dct bench kernels``: what the kernels cost on this machine."""

import re
from pathlib import Path

import click
import torch

from dct_compile import ops
from dct_compile.bench.kernels import Bench, Measurement, MismatchError, Settings, plan
from dct_compile.bench.machine import circumstances, device_name, keep_freed_memory
from dct_compile.bench.results import CsvFile, ops_table, step_overheads, steps_table
from dct_compile.bench.timing import Stopwatch
from dct_compile.cli.extras import require
from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.build import load_library

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SMALLEST, _LARGEST = 2**14, 2**30
"""Numbers of elements that can be asked for: the longest rows have 2^14."""
_SIZES, _QUICK_SIZES = tuple(2**n for n in range(16, 29, 2)), (2**18,)
_DENSITIES, _QUICK_DENSITIES = (0.001, 0.01, 0.05, 0.25), (0.01,)
_SECONDS, _QUICK_SECONDS = 0.2, 0.02


class _PowerOfTwo(click.ParamType[int]):
    name = "2^N"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the number that ``2^24`` or ``16777216`` says."""
        match = re.fullmatch(r"2\^(\d{1,2})|(\d{1,12})", value)
        numel = 0 if match is None else 2 ** int(match[1]) if match[1] else int(match[2])
        if numel & (numel - 1) or not _SMALLEST <= numel <= _LARGEST:
            self.fail(f"{value!r} is not a power of two from 2^14 to 2^30, such as 2^24 or 16777216", param, ctx)
        return numel


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@click.option("--size", "sizes", type=_PowerOfTwo(), multiple=True, help="Elements; repeatable. Default: 2^16, 2^18, ... 2^28.")
@click.option(
    "--density",
    "densities",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    help=f"Fraction kept; repeatable. Default: {', '.join(map(str, _DENSITIES))}.",
)
@click.option(
    "--dtype", "dtypes", type=click.Choice(list(_DTYPES)), multiple=True, help="Of gradients and rows; repeatable. Default: both."
)
@click.option("--op", "names", type=click.Choice(ops.__all__), multiple=True, help="Repeatable. Default: all.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help=f"For each timing; at least 3 runs. Default: {_SECONDS}.")
@click.option(
    "--inductor/--no-inductor", default=None, help="Compile baselines with torch.compile, too. Default: yes, but not with --quick."
)
@click.option(
    "--quick", is_flag=True, help="Less than half a minute: 2^18 float32 elements, density 0.01, one row width. Other options go first."
)
@click.option(
    "--keep-memory", is_flag=True, help="On a CPU: keep what is freed, so that no page fault of a fresh result is timed with an op."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("benchmarks/results"), show_default=True)
def kernels(
    device: str | None,
    sizes: tuple[int, ...],
    densities: tuple[float, ...],
    dtypes: tuple[str, ...],
    names: tuple[str, ...],
    seconds: float | None,
    inductor: bool | None,
    quick: bool,
    keep_memory: bool,
    out: Path,
) -> None:
    """Time every op of torch.ops.dct beside a copy, torch.add and the same work in ordinary PyTorch ops.

    Each op is first compared with its reference; a difference ends the run with an error. Writes kernels-DEVICE.csv and
    kernels-DEVICE.png (with --keep-memory kernels-DEVICE-kept.*) to --out.
    """
    require("tqdm", "matplotlib")
    settings = Settings(
        device=_device(device),
        ops=names or tuple(ops.__all__),
        sizes=tuple(sorted(set(sizes or (_QUICK_SIZES if quick else _SIZES)))),
        densities=tuple(sorted(set(densities or (_QUICK_DENSITIES if quick else _DENSITIES)))),
        dtypes=tuple(_DTYPES[name] for name in dict.fromkeys(dtypes or (("float32",) if quick else _DTYPES))),
        widths=1 if quick else None,
        seconds=seconds or (_QUICK_SECONDS if quick else _SECONDS),
        inductor=not quick if inductor is None else inductor,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"cannot write to {out}: {error}") from error
    if keep_memory:
        keep_freed_memory()
    _run(settings, out / f"kernels-{settings.device.type}{'-kept' if keep_memory else ''}", "kept" if keep_memory else "system")


def _device(name: str | None) -> torch.device:
    """Returns the device to measure; an error where it is missing, or where its kernels are."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch finds no CUDA device")
    if device.type == "cuda" and not HAS_TRITON:
        raise click.ClickException("there is no Triton, so the ops run their slow references: nothing to measure")
    if device.type == "cpu" and load_library() is None:
        raise click.ClickException("the CPU kernels could not be compiled, so the ops run their slow references: nothing to measure")
    return device


def _run(settings: Settings, target: Path, memory: str) -> None:
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
    # Late: matplotlib may be missing.
    from dct_compile.bench.roofline import draw_roofline

    target.with_suffix(".png").write_bytes(draw_roofline(measurements, caption))
    click.echo(f"\nWritten: {target}.csv, {target}.png")


def _measure(settings: Settings, stopwatch: Stopwatch, file: CsvFile) -> list[Measurement]:
    # Late: tqdm may be missing.
    from dct_compile.cli.progress import Progress

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
