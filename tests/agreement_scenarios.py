"""Scenarios of ranks that agree or not, for `test_agreement.py`: each is played by the ranks of one process group of its own."""

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from dct_compile.agreement import Agreement
from dct_compile.posts import Signature

MASKED = Signature("all_to_all_single activation float32 [64]", "mask slots=4", "top +3")
DENSE = Signature("all_to_all_single activation float32 [64]", "dense", "top +3")
WIDE = Signature("all_to_all_single activation float32 [80]", "mask slots=4", "top +3")
GATHER = Signature("all_reduce gradient float32 [4096]", "gather density=0.01", "top.weight +3")
GATHER_MORE = Signature("all_reduce gradient float32 [4096]", "gather density=0.05", "top.weight +3")
LONG_S, SHORT_S = 60.0, 2.0
"""The timeout of a group, and of one in which a rank never comes."""

Outcome = list[tuple[str, float]]
"""For each check of a rank: the error or "", and the seconds that it took."""


class Scene:
    """What a scenario works with: one rank's agreement, and a process group of ``members`` made for it alone."""

    def __init__(self, members: Sequence[int], timeout_s: float) -> None:
        self.rank = dist.get_rank()
        self.agreement = Agreement()
        self.group: Any = dist.new_group(list(members), timeout=timedelta(seconds=LONG_S))
        self.outcome: Outcome = []
        if timeout_s < LONG_S and self.rank in members:
            # The first check connects to the store, which may take longer than this timeout.
            self.agreement.check(self.group, {}, [], fresh=True)
            self.group.set_timeout(timedelta(seconds=timeout_s))

    def check(self, *signatures: Signature, fresh: bool = False, group: Any = None, **options: object) -> None:
        started = time.monotonic()
        error = ""
        try:
            self.agreement.check(group or self.group, options, signatures, fresh=fresh)
        except RuntimeError as raised:
            error = str(raised)
        self.outcome.append((error, time.monotonic() - started))

    def exchange(self) -> None:
        dist.all_reduce(torch.zeros(1), group=self.group)


def equal(scene: Scene) -> None:
    scene.check(MASKED, GATHER)
    scene.check(DENSE, fresh=True)


def one_rank_again(scene: Scene) -> None:
    scene.check(MASKED, GATHER)
    if scene.rank == 0:
        scene.check(GATHER, MASKED, MASKED)


def alone_without_sites(scene: Scene) -> None:
    if scene.rank == 0:
        scene.check()


def later_check(scene: Scene) -> None:
    scene.check(fresh=True)
    scene.check(GATHER)
    scene.check((MASKED, DENSE)[scene.rank])


def other_option(scene: Scene) -> None:
    scene.check(MASKED, (GATHER, GATHER_MORE)[scene.rank], dp_density=(0.01, 0.05)[scene.rank], min_numel=128)


def other_site(scene: Scene) -> None:
    scene.check(GATHER, (MASKED, WIDE)[scene.rank])


def first_site(scene: Scene) -> None:
    scene.check((MASKED, WIDE)[scene.rank])


def missing_site(scene: Scene) -> None:
    scene.check(*((GATHER, MASKED), (GATHER,))[scene.rank], fresh=True)


def other_order(scene: Scene) -> None:
    scene.check(*((MASKED, DENSE), (DENSE, MASKED))[scene.rank])


def again_after_an_error(scene: Scene) -> None:
    scene.check((MASKED, DENSE)[scene.rank])
    scene.check(MASKED)
    scene.check((GATHER, GATHER_MORE)[scene.rank], fresh=True)
    scene.check(GATHER, fresh=True)


def late(scene: Scene) -> None:
    time.sleep(3 * scene.rank)
    scene.check(MASKED)


def fresh_twice(scene: Scene) -> None:
    scene.check(GATHER, fresh=True)
    scene.check(GATHER_MORE, fresh=True)
    scene.check(GATHER, GATHER_MORE)


def second_model(scene: Scene) -> None:
    scene.check(GATHER, fresh=True)
    scene.check((GATHER, GATHER_MORE)[scene.rank], fresh=True)


def third_rank_differs(scene: Scene) -> None:
    scene.check((GATHER, GATHER, GATHER_MORE)[scene.rank], fresh=True)


def subgroup(scene: Scene) -> None:
    scene.check(GATHER if scene.rank == 1 else GATHER_MORE)


def third_rank_absent(scene: Scene) -> None:
    if scene.rank != 2:
        scene.check(GATHER)


def first_rank_absent(scene: Scene) -> None:
    if scene.rank != 0:
        scene.check(GATHER)


def too_late(scene: Scene) -> None:
    time.sleep((SHORT_S + 1) * scene.rank)
    scene.check(MASKED)


def first_rank_too_late(scene: Scene) -> None:
    time.sleep((SHORT_S + 1) * (1 - scene.rank))
    scene.check(MASKED)


def cut_elsewhere(scene: Scene) -> None:
    """Each rank runs a graph of its own, or both in one; every rank exchanges both."""
    for signatures in ([MASKED, GATHER],) if scene.rank == 1 else ([MASKED], [GATHER]):
        scene.check(*signatures)
        for _ in signatures:
            scene.exchange()


def backward_cut_elsewhere(scene: Scene) -> None:
    """Gradients come in the reverse order of the graphs, and are exchanged when all graphs have been checked."""
    for signatures in ([GATHER_MORE, GATHER],) if scene.rank == 1 else ([GATHER], [GATHER_MORE]):
        scene.check(*signatures)
    scene.exchange()


def cut_elsewhere_and_different(scene: Scene) -> None:
    """Rank 1 is inside of the exchange when rank 0 finds the difference."""
    if scene.rank == 0:
        scene.check(MASKED)
        scene.exchange()
        scene.check(GATHER, dp_density=0.01)
        return
    scene.check(MASKED, GATHER_MORE, dp_density=0.05)
    scene.exchange()
    try:
        scene.exchange()
    except RuntimeError as error:
        started = time.monotonic()
        scene.agreement.explain(scene.group, error)
        scene.outcome.append(("\n".join(getattr(error, "__notes__", [])), time.monotonic() - started))


def nothing_to_explain(scene: Scene) -> None:
    scene.check(MASKED)
    error = RuntimeError("connection reset")
    scene.agreement.explain(scene.group, error)
    scene.outcome.append(("\n".join(getattr(error, "__notes__", [])), 0.0))


def second_life(scene: Scene) -> None:
    """The store still holds what the group's earlier life left there."""
    scene.check(GATHER)
    scene.agreement = Agreement()
    scene.check(GATHER_MORE)
    scene.check((GATHER, DENSE)[scene.rank])


def two_threads(scene: Scene) -> None:
    """Rank 0 waits in one thread for what rank 1 checks only after what rank 0 checks in another."""
    if scene.rank == 0:
        thread = threading.Thread(target=scene.check, args=(MASKED,))
        thread.start()
        time.sleep(0.5)
        scene.check(GATHER, group=dist.group.WORLD)
        thread.join()
        return
    scene.check(GATHER, group=dist.group.WORLD)
    if scene.rank == 1:
        scene.check(MASKED)


def traffic(scene: Scene) -> None:
    """Instead of an error: the keys that a check of 200 sites adds to the store, all ranks together."""
    scene.check(MASKED)
    dist.barrier()
    keys = _get_default_store().num_keys()
    dist.barrier()
    scene.check(*(Signature(f"all_reduce gradient float32 [{width}]", "gather", f"layer {width}") for width in range(200)))
    dist.barrier()
    scene.outcome.append((str(_get_default_store().num_keys() - keys), 0.0))
