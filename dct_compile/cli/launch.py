"""Starts the ranks, or joins those that torchrun started, and shows the results once they are done."""

import os

import click
from torch._C._distributed_c10d import TCPStore
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from dct_compile.cli.present import present
from dct_compile.cli.settings import Settings
from dct_compile.cli.worker import work


def launch(settings: Settings) -> None:
    """Trains on ``settings.world_size`` ranks and presents the results (under torchrun: on rank 0).

    Raises ``click.ClickException`` when torchrun started another number of ranks or a rank failed.
    """
    # One thread per rank: they share the cores, and the order of a sum must not depend on the machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        world_size = int(os.environ["WORLD_SIZE"])
        if world_size != settings.world_size:
            raise click.ClickException(
                f"torchrun started {world_size} ranks, --dp {settings.dp} --mp {settings.mp} needs {settings.world_size}"
            )
        work(int(os.environ["RANK"]), settings, None)
        if os.environ["RANK"] != "0":
            return
    else:
        # The ranks meet at a store whose port the system chose, so that two runs on one machine do not collide.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        try:
            spawn(work, (settings, store.port), nprocs=settings.world_size)
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise click.ClickException(str(error)) from error
    present(settings.out)
