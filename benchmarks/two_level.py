"""Hosts with several ranks each on slow links: the schemes that treat all ranks alike, and the one that adds up inside a host first.

The ranks of a host share its link, and reach one another over loopback. The methods are those of ``slow_cells.py``; "dct" measures
the link and decides.

    python benchmarks/two_level.py [--hosts 2] [--ranks-per-host 2] [--rate 100mbit] [--methods "dct owner;dct two_level"]
"""

import statistics

import click
from slow_cells import METHODS, ON_SHARED_HOSTS, RATES
from slow_hosts import SlowHosts
from slow_links import Ranks, listed
from tabulate import tabulate

from dct_compile.bench.machine import circumstances

COMPARED = ("dense", "fp16 hook", "dct gather", "dct owner", "dct two_level", "dct")


@click.command()
@click.option("--model", default="gpt", help="The model, of slow_links.py.")
@click.option("--hosts", default=2, help="Hosts.")
@click.option("--ranks-per-host", default=2, help="Ranks of each host.")
@click.option("--rate", type=click.Choice(list(RATES)), default="100mbit", help="Bits per second of a host's link.")
@click.option("--seconds", default=5.0, help="Seconds of each method.")
@click.option("--methods", default=";".join(COMPARED), help="Methods, separated by semicolons.")
def main(model: str, hosts: int, ranks_per_host: int, rate: str, seconds: float, methods: str) -> None:
    """Prints a table: bytes that a host sends in a step, and seconds of a step, median and spread."""
    rows, names = [], listed(methods, ";", METHODS | ON_SHARED_HOSTS)
    with SlowHosts(hosts, None, ranks_per_host=ranks_per_host) as slow:
        ranks = Ranks(slow)
        for method in names:
            # Only "dct" looks at the link, so the others are compiled and warmed up without a limit.
            ranks.ask(RATES[rate] if method == "dct" else None, do="build", model=model, method=method)
            compute = ranks.ask(None, do="compute")[0]["times"]
            answers = ranks.ask(RATES[rate], do="steps", seconds=seconds)
            times = [max(of_ranks) for of_ranks in zip(*(answer["times"] for answer in answers), strict=True)]
            sent = max(answer["sent_bytes"] for answer in answers)
            spread = f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})"
            rows.append([method, f"{sent:,.0f}", f"{statistics.median(compute):.3f}", spread])
            print(*rows[-1], flush=True)
    print(f"{model}, {hosts} hosts with {ranks_per_host} ranks each, {rate}; {circumstances()}")
    print(tabulate(rows, ["method", "bytes of a host", "compute s", "step s"], disable_numparse=True))


if __name__ == "__main__":
    main()
