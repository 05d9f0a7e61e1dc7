"""``dct link``: measures the link between the ranks that torchrun has started."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from dct_compile.cli.launched import check_meeting_place, number, rank_and_ranks
from dct_compile.link import Link, duration, rate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LAUNCH = """torchrun --nnodes 2 --nproc-per-node 1 --node-rank {} --master-addr HOST0 --master-port 29500 --no-python {}"""


@click.command()
def link() -> None:
    r"""Measure the link between the ranks that this command is started on, and print the option that says it.

    \b
    On every host, with its own --node-rank:
      torchrun --nnodes 2 --nproc-per-node 1 --node-rank 0 --master-addr HOST0 --no-python dct link
    """
    if "RANK" not in os.environ:
        raise click.UsageError(
            f"there is no RANK in the environment, so there are no ranks to measure between.\n{launch_lines('dct link')}"
        )
    with ranks_of_launcher() as group:
        lines = told(group)
        if group.rank() == 0:
            click.echo("\n".join(lines))


def launch_lines(command: str) -> str:
    """Returns how ``command`` is started on two hosts."""
    return "\n".join(["Start it with torchrun on every host:", *(f"  host {host}:  {_LAUNCH.format(host, command)}" for host in range(2))])


@contextmanager
def ranks_of_launcher() -> Iterator["ProcessGroup"]:
    """Joins the ranks that torchrun has started, until the context ends.

    Raises ``click.ClickException`` where it has started one rank alone, or none.
    """
    if rank_and_ranks()[1] < 2:
        raise click.ClickException(f"one rank alone has no link: torchrun has to start at least two.\n{launch_lines('dct link')}")
    check_meeting_place()
    # Late, so that `dct --help` and usage errors do not wait for it.
    import torch
    import torch.distributed as dist

    from dct_compile.workarounds.gloo import shorten_names

    shorten_names()
    if torch.cuda.is_available():
        torch.cuda.set_device(number("LOCAL_RANK", "0") % torch.cuda.device_count())
    dist.init_process_group()
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
        dist.barrier()  # rank 0 has the store: it goes last
    finally:
        dist.destroy_process_group()


def told(group: "ProcessGroup") -> list[str]:
    """Measures the link of ``group`` and returns what is to be said about it. All ranks of the group make this call.

    Raises ``click.ClickException`` where a rank has not come in time.
    """
    # Late, so that `dct --help` and usage errors do not wait for it.
    import torch.distributed as dist

    from dct_compile.link_measure import device_of, measured
    from dct_compile.links import PATIENCE_S, agreed, host, on_one_machine

    found = agreed(group, measured, recognise=False)
    if found is None:
        raise click.ClickException(f"a rank has not come within {PATIENCE_S:g} s, so nothing was measured")
    lines = [
        f"link between {group.size()} ranks, measured with all_gather over {group._get_backend(device_of(group)).name()}",
        f"  rate             {rate(found.bytes_per_s)} ({found.bytes_per_s / 1e6:,.1f} MB/s) that a rank puts on the wire",
        f"  latency          {duration(found.latency_s)} per hop",
    ]
    if found.copy_bytes_per_s is not None:
        lines.append(f"  memory           {found.copy_bytes_per_s / 1e9:,.1f} GB/s that an operator reads and writes")
    if found.inside_bytes_per_s is not None:
        lines.append(f"  inside a host    {found.inside_bytes_per_s / 1e6:,.1f} MB/s that a rank sends to another one of its host")
    hosts: list[str] = [""] * group.size()
    dist.all_gather_object(hosts, host(), group=group)
    if (on_one_machine() or len(set(hosts)) == 1) and device_of(group).type == "cpu":
        lines.append("All ranks are on one machine: there the default link='auto' leaves every collective dense.")
    else:
        lines.append("The default link='auto' measures the same when a training starts. To fix it:")
    return [*lines, f"  {option(found)}"]


def option(found: Link) -> str:
    """Returns the option ``link`` as it stands behind ``--options``, with three digits."""
    return f"link={json.dumps({name: float(f'{number:.3g}') for name, number in found.numbers().items()})}"
