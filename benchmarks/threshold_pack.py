"""What packing a gradient costs on a CPU, against one ``torch.add(a, b, out=c)`` over the same elements in the same run.

The floor. Both read two arrays and write one. ``torch.add`` into a third array moves 16 bytes per element (the written lines are read
first); packing works in place on the residual (12 bytes) and looks at the gradient once more for NaN and Inf (4 bytes): 16 bytes too, so
a ratio of about 1 is what memory allows.

    python benchmarks/threshold_pack.py [--numel 25000000] [--repeats 15]
"""

import click
import torch
from measure import circumstances, interleaved
from tabulate import tabulate

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.triton_kernels.layout import COUNTERS, choose_block

DENSITY, CAPACITY_FACTOR = 0.01, 1.1


@click.command()
@click.option("--numel", default=25_000_000, help="Elements of the gradient (float32).")
@click.option("--repeats", default=15, help="Timed rounds.")
def main(numel: int, repeats: int) -> None:
    """Prints the median times and their ratios to torch.add."""
    torch.manual_seed(0)
    gradient, residual, added = torch.randn(numel), torch.zeros(numel), torch.empty(numel)
    threshold, counters = torch.full((1,), float("inf")), torch.zeros(1, COUNTERS, dtype=torch.int64)
    geometry = ([0, numel], choose_block(DENSITY), 1, -1)
    select = torch.ops.dct.select_threshold.default
    pack = torch.ops.dct.threshold_pack.default
    unpack = torch.ops.dct.unpack_accumulate.default
    select(gradient, residual, threshold, counters, *geometry, DENSITY, "exact", 0.0, 1000, "off", True)
    tau = threshold.clone()
    wire = (DENSITY * CAPACITY_FACTOR, torch.bfloat16)

    def prepare() -> None:
        """The state of a refresh step: selected threshold, empty residual, so that exactly ``DENSITY`` is kept."""
        residual.zero_()
        counters.zero_()
        threshold.copy_(tau)

    payload = pack(gradient, residual, threshold, counters, *geometry, *wire, True)
    payloads = torch.cat([payload, payload])
    times = interleaved(
        {
            "torch.add(a, b, out=c)": lambda: torch.add(gradient, residual, out=added),
            "threshold_pack": lambda: pack(gradient, residual, threshold, counters, *geometry, *wire, True),
            "select_threshold (exact)": lambda: select(
                gradient, residual, threshold, counters, *geometry, DENSITY, "exact", 0.0, 1000, "off", True
            ),
            "unpack_accumulate (2 payloads)": lambda: unpack(payloads, None, numel, torch.float32, *geometry, *wire, 2),
        },
        repeats,
        prepare,
    )
    base = times["torch.add(a, b, out=c)"].median_ms
    rows = [[name, time.median_ms, time.p20_ms, time.p80_ms, time.median_ms / base] for name, time in times.items()]
    print(f"{numel} float32 elements, density {DENSITY}, payload {payload.numel()} bytes; {circumstances()}")
    print(tabulate(rows, ["operation", "median ms", "p20", "p80", "x torch.add"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
