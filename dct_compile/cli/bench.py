"""``dct bench kernels``: what the kernels cost on this machine."""

import re
from pathlib import Path

import click

from dct_compile.cli.asked import make_folder
from dct_compile.cli.extras import require
from dct_compile.cli.parsing import FiniteRange

OPS = (
    "dequantize_rows",
    "gather_rows",
    "pack_rows",
    "prepare_moments",
    "quantize_rows",
    "repack",
    "scatter_rows",
    "select_threshold",
    "store",
    "threshold_pack",
    "unpack_accumulate",
    "unpack_into",
    "unpack_rows",
)
"""All of ``torch.ops.dct``, for the help, which does without torch."""
_DTYPES = ("float32", "bfloat16")
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
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    help=f"Fraction kept; repeatable. Default: {', '.join(map(str, _DENSITIES))}.",
)
@click.option("--dtype", "dtypes", type=click.Choice(_DTYPES), multiple=True, help="Of gradients and rows; repeatable. Default: both.")
@click.option("--op", "names", type=click.Choice(OPS), multiple=True, help="Repeatable. Default: all.")
@click.option("--seconds", type=FiniteRange(0, min_open=True), help=f"For each timing; at least 3 runs. Default: {_SECONDS}.")
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
    # Late, so that the help and usage errors do not wait for torch.
    import torch

    from dct_compile.bench.kernels import Settings
    from dct_compile.bench.machine import keep_freed_memory
    from dct_compile.cli.bench_measurements import device_of, run

    settings = Settings(
        device=device_of(device),
        ops=names or OPS,
        sizes=tuple(sorted(set(sizes or (_QUICK_SIZES if quick else _SIZES)))),
        densities=tuple(sorted(set(densities or (_QUICK_DENSITIES if quick else _DENSITIES)))),
        dtypes=tuple(getattr(torch, name) for name in dict.fromkeys(dtypes or (("float32",) if quick else _DTYPES))),
        widths=1 if quick else None,
        seconds=seconds or (_QUICK_SECONDS if quick else _SECONDS),
        inductor=not quick if inductor is None else inductor,
    )
    target = out / f"kernels-{settings.device.type}{'-kept' if keep_memory else ''}"
    make_folder(out, f"{target.name}.csv")
    if keep_memory:
        keep_freed_memory()
    run(settings, target, "kept" if keep_memory else "system")
