"""Starts the ranks, or joins those that torchrun started, and shows the results once they are done."""

import os

import click
from torch._C._distributed_c10d import TCPStore

from dct_compile.cli.launched import check_meeting_place, rank_and_ranks
from dct_compile.cli.present import present
from dct_compile.cli.ranks import run_ranks
from dct_compile.cli.settings import Settings
from dct_compile.cli.worker import work


def launch(settings: Settings) -> None:
    """Trains on ``settings.world_size`` ranks and presents the results (under torchrun: on rank 0).

    Raises ``click.ClickException`` when torchrun started another number of ranks or a rank failed.
    """
    if os.environ.get("RANK", "0") == "0":
        length = f"{settings.steps} steps" if settings.steps is not None else f"{settings.epochs} epochs"
        click.echo(
            f"training {settings.model} on {settings.dataset}: {', '.join(settings.backends)}, {settings.seeds} x {length} each,"
            f" {settings.dp} x {settings.mp} ranks"
        )
    # One thread per rank: they share the cores, and the order of a sum must not depend on the machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, world_size = rank_and_ranks()
        if world_size != settings.world_size:
            raise click.ClickException(
                f"torchrun started {world_size} ranks, --dp {settings.dp} --mp {settings.mp} needs {settings.world_size}"
            )
        check_meeting_place()
        work(rank, settings, None)
        if rank != 0:
            return
    else:
        # The ranks meet at a store whose port the system chose, so that two runs on one machine do not collide.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        run_ranks(work, (settings, store.port), settings.world_size)
    present(settings.out)
