"""Rows and notes of the report: all that DDP sends, models that can be told apart, and what is outside."""

import gc
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from dct_compile.reasons import BreakAdvice, Note, Reason, Unseen
from dct_compile.runtime import RUNTIME
from tests.rank_pool import Ranks
from tests.ranks_ddp import Net, ddp_of, loss_of

pytestmark = pytest.mark.distributed


class Normed(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.linear, self.norm, self.top, self.broken = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16), broken

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.linear(x))
        if self.broken:
            torch._dynamo.graph_break()
        return self.top(hidden)


def run(compiled: Any, steps: int = 2) -> None:
    for _ in range(steps):
        loss_of(compiled(torch.randn(8, 16))).backward()


def rows(rank: int, world_size: int, inside: bool, settings: dict[str, Any], explained: bool) -> list[tuple[Any, ...]]:
    """Returns what the report says of all that DDP sends beside its buckets."""
    module, compiled = ddp_of(Normed(), {}, inside, **settings)
    if not explained:
        run(compiled)
    report = dct_compile.explain(module, torch.randn(8, 16)) if explained else dct_compile.report()
    beside = [site for site in report.sites if report.graphs[site.graph].name == "DDP(Normed)"]
    assert {site.decision for site in beside} <= {"dense"}
    return [(site.collective, site.kind, site.name, site.dtype, site.wire_bytes, site.reason) for site in beside]


STATISTICS = ("broadcast", "buffers", "norm.running_mean, norm.running_var", "float32", 2 * 32 * 4 // 2, Reason.BUFFERS)
BATCHES = ("broadcast", "buffers", "norm.num_batches_tracked", "int64", 8 // 2, Reason.BUFFERS)


@pytest.mark.parametrize(("inside", "explained"), [(False, False), (True, False), (False, True)])
def test_buffers_are_counted(ranks2: Ranks, inside: bool, explained: bool) -> None:
    assert ranks2(rows, inside, {}, explained) == [[STATISTICS, BATCHES]] * 2


def test_buffers_that_stay_where_they_are_have_no_row(ranks2: Ranks) -> None:
    assert ranks2(rows, False, {"broadcast_buffers": False}, False) == [[]] * 2


def test_flags_of_used_parameters_are_counted(ranks2: Ranks) -> None:
    flags = ("all_reduce", "other", "flags of DDP: which parameters were used", "int32", 6 * 4, Reason.USED_PARAMETERS)
    assert ranks2(rows, False, {"broadcast_buffers": False, "find_unused_parameters": True}, False) == [[flags]] * 2


def ignored(rank: int, world_size: int, options: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Returns all parameters in the rows of gradients, and the notes."""
    model = Normed()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["top.weight", "norm.running_mean"])
    run(ddp_of(model, options, False)[1])
    report = dct_compile.report()
    sizes = [site.shape[0] for site in report.sites if site.kind == "gradient"]
    assert sum(sizes) == sum(parameter.numel() for name, parameter in model.named_parameters() if name != "top.weight")
    return [site.name for site in report.sites if site.kind == "buffers"], list(report.notes)


@pytest.mark.parametrize("options", [{}, {"dp_density": 1}])
def test_ignored_parameters_are_not_claimed(ranks2: Ranks, options: dict[str, Any]) -> None:
    for buffers, notes in ranks2(ignored, options):
        assert buffers == ["norm.running_var", "norm.num_batches_tracked"]
        assert notes == [Note.IGNORED.format(parameters="top.weight")]


def shared_out(rank: int, world_size: int, explained: bool) -> list[str]:
    """Two DDP modules, one around the other, ignore what the other one averages, and both a third parameter. Returns the notes."""
    model = Normed()
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    names = [name for name, _ in model.named_parameters()]
    ignore(model, [name for name in names if not name.startswith("linear")])
    inner = DistributedDataParallel(model, broadcast_buffers=False)
    ignore(inner, ["top.weight", *(f"module.{name}" for name in names if name == "top.weight" or name.startswith("linear"))])
    outer = DistributedDataParallel(inner, broadcast_buffers=False)
    if explained:
        return list(dct_compile.explain(outer, torch.randn(8, 16)).notes)
    run(torch.compile(outer, backend=dct))
    return list(dct_compile.report().notes)


@pytest.mark.parametrize("explained", [False, True])
def test_what_another_ddp_module_averages_is_not_ignored(ranks2: Ranks, explained: bool) -> None:
    assert ranks2(shared_out, explained) == [[Note.IGNORED.format(parameters="top.weight")]] * 2


def two_models(rank: int, world_size: int, inside: bool, subgroup: bool) -> tuple[list[str], list[str]]:
    """Returns names of graphs, and labels of a monitor."""
    settings = {"process_group": dist.new_group([0, 1])} if subgroup else {}
    models = [ddp_of(Net(width), {}, inside, **settings)[1] for width in (32, 64)]
    for model in models:
        run(model)
    with dct_compile.monitor(every=1) as monitor:
        monitor.step()
    return [graph.name for graph in dct_compile.report().graphs], [site.label for site in monitor.sites]


@pytest.mark.parametrize(("inside", "subgroup"), [(False, False), (True, False), (False, True)])
def test_two_models_of_one_class_can_be_told_apart(ranks2: Ranks, inside: bool, subgroup: bool) -> None:
    for names, labels in ranks2(two_models, inside, subgroup):
        of_group = [name.partition(" of group ")[1] != "" for name in names]
        assert [name.partition(" of group ")[0] for name in names] == ["DDP(Net) bucket 0", "DDP(Net) #2 bucket 0"]
        assert of_group == [subgroup] * 2
        assert labels[1] == f"DDP(Net) #2 {labels[0]}"


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def broken(rank: int, world_size: int, ranks: tuple[int, ...], how: str) -> tuple[list[str], list[str]]:
    """Returns the warnings and notes of a training in which the graphs of ``ranks`` break."""
    logger, warnings = logging.getLogger("dct_compile"), _Warnings()
    logger.addHandler(warnings)
    model = Normed(broken=rank in ranks)
    options = {"data_parallel": True} if how == "data_parallel" else {}
    run(ddp_of(model, options, False)[1] if how == "ddp" else torch.compile(model, backend=dct, options=options))
    logger.removeHandler(warnings)
    return warnings.texts, [note for note in dct_compile.report().notes if note.startswith("a graph ends early")]


@pytest.mark.parametrize("how", ["ddp", "data_parallel", "alone"])
def test_a_graph_break_of_all_ranks_is_logged_by_one(ranks2_once: Ranks, how: str) -> None:
    first, second = ranks2_once(broken, (0, 1), how)
    assert first[1] == second[1]
    assert [*first[0], *second[0]] == first[1]


def test_a_graph_break_of_one_rank_is_logged_there(ranks2: Ranks) -> None:
    first, second = ranks2(broken, (1,), "ddp")
    assert first == ([], [])
    assert second[0] == second[1]
    assert len(second[0]) == 1


@pytest.mark.parametrize(
    ("how", "advice"),
    [("ddp", ()), ("data_parallel", (BreakAdvice.DATA_PARALLEL, BreakAdvice.FULLGRAPH)), ("alone", (BreakAdvice.FULLGRAPH,))],
)
def test_only_advice_that_applies(ranks2_once: Ranks, how: str, advice: tuple[str, ...]) -> None:
    for _, (note,) in ranks2_once(broken, (0, 1), how):
        assert note.endswith("are not seen" + "".join(advice))


def outside(rank: int, world_size: int, what: str) -> list[str]:
    mesh, model = init_device_mesh("cpu", (world_size,)), Net()
    compiled: Any = torch.compile(model, backend=dct)
    if what == "fully_shard":
        fully_shard(model, mesh=mesh)
        run(compiled)
    elif what == "fsdp":
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        run(torch.compile(wrapped, backend=dct))
    elif what == "tensor parallel":
        parallelize_module(model, mesh, {"top": ColwiseParallel()})
        run(compiled)
    return [note for note in dct_compile.report().notes if not note.startswith("no gradient")]


@pytest.mark.parametrize(("what", "unseen"), [("fsdp", Unseen.FSDP), ("tensor parallel", Unseen.DTENSOR)])
def test_collectives_outside_are_named(ranks2: Ranks, what: str, unseen: Unseen) -> None:
    assert ranks2(outside, what) == [[Note.UNSEEN.format(what=unseen)]] * 2


def test_fully_shard_is_seen(ranks2: Ranks) -> None:
    assert ranks2(outside, "fully_shard") == [[], []]


def made(how: str, width: int) -> Any:
    if how == "graph":
        return torch.compile(Net(width), backend=dct, options={"data_parallel": True})
    return ddp_of(Normed(), {"dp_density": 1}, False)[1] if how == "dense" else ddp_of(Net(width), {}, False)[1]


def dropped(rank: int, world_size: int, how: str) -> tuple[list[int], list[bool]]:
    """Returns the number of entries after each of several models in a row, and whether the report of a dead model is still there."""
    entries, told = [], []
    for width in range(32, 40):
        torch._dynamo.reset()
        compiled = made(how, width)
        run(compiled)
        entries.append(len(RUNTIME.reports.entries))
        sent = dct_compile.report().wire_bytes
        del compiled
        gc.collect()
        told.append(dct_compile.report().wire_bytes == sent > 0)
    return entries, told


@pytest.mark.parametrize("how", ["graph", "ddp", "dense"])
def test_models_that_are_gone_leave_the_report_with_the_next_one(ranks2: Ranks, how: str) -> None:
    for entries, told in ranks2(dropped, how):
        assert set(entries) == {1}
        assert all(told)


def reused(rank: int, world_size: int) -> list[list[int]]:
    """Returns the calls of the entries while one compiled graph serves several models, all of one class."""
    seen = []
    for width in (32, 32, 48, 32):
        run(torch.compile(Net(width), backend=dct, options={"data_parallel": True}))
        gc.collect()
        seen.append([site.calls for site in dct_compile.report().sites])
    return seen


def test_a_compiled_graph_comes_back_with_a_new_model(ranks2: Ranks) -> None:
    """The third model has a graph of its own; the fourth runs that of the first two again."""
    assert ranks2(reused) == [[[1], [1], [1], [1]]] * 2
