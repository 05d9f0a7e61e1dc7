"""Predictions of a training step, against seconds and bytes worked out by hand, and the commands ``dct advise`` and ``dct link``."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner, Result
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from dct_compile.advice import Training, late_step_seconds, measured_compute_s, step_seconds
from dct_compile.cli.link import told
from dct_compile.cli.main import main
from dct_compile.cli.settings import parse_value
from dct_compile.config import DCTConfig
from dct_compile.exchange import GRADIENT, Exchange, Parameter, segments_of
from dct_compile.inspection import fake_ranks, inspected
from dct_compile.link import ONE_MACHINE, Link, parse
from dct_compile.passes.collectives import ALL_REDUCE
from dct_compile.passes.plan import Decision, decide
from dct_compile.reasons import Reason
from tests.rank_pool import Ranks

GIGABIT = Link(1.25e8, 50e-6)
USERS_FILE = """
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(256, 256)

    def forward(self, x):
        return funcol.all_to_all_single_autograd(self.layer(x), None, None, dist.group.WORLD).sin()

def wrapped(): return nn.parallel.DistributedDataParallel(Net()), torch.randn(16, 256)
"""


def bucket(config: DCTConfig, side: int, ranks: int = 2) -> Decision:
    """Decides by bytes about the gradient of one matrix of ``side`` x ``side`` float32."""
    segments = segments_of([Parameter(0, "weight", (side, side))])
    exchange = Exchange(
        ALL_REDUCE, GRADIENT, "weight", (side**2,), torch.float32, "0", ranks, 0, 4 * side**2, reduce_op="avg", segments=segments
    )
    return decide(exchange, config)


def training(*, side: int = 1000, buckets: int = 1, compute_s: float = 0.1, **options: Any) -> Training:
    config = DCTConfig(**options)
    return Training([bucket(config, side)] * buckets, config, compute_s)


def test_step_by_hand() -> None:
    # The backward is 2/3 of 0.3 s, so that it hides 0.2 s of the gradients, but none of the last bucket.
    assert step_seconds(0.3, 0.05, 0.4, 0.1) == pytest.approx(0.3 + 0.05 + 0.1 + 0.1)
    assert step_seconds(0.3, 0.0, 0.2, 0.1) == pytest.approx(0.4)
    assert step_seconds(0.3, 0.0, 0.1, 0.1) == pytest.approx(0.4)
    assert late_step_seconds(0.3, 0.05, 0.2) == pytest.approx(0.35)
    assert late_step_seconds(0.3, 0.05, 0.4) == 0.4


def test_dense_and_fp16_by_hand() -> None:
    one = training()
    # A ring of two ranks: 4 MB leave a rank, in two hops.
    assert one.sent("dense").gradients.wire_bytes == 4_000_000
    assert one.step_s("dense", GIGABIT) == pytest.approx(0.1 + 0.032 + 0.0001)
    # Half of that, and 12 bytes per element that the casts read and write at 8 GB/s.
    assert one.sent("fp16").gradients.wire_bytes == 2_000_000
    assert one.step_s("fp16", GIGABIT) == pytest.approx(0.1 + 0.016 + 0.0001 + 0.0015)
    # Of two buckets, the first one is sent while the backward runs for 20 ms.
    assert training(buckets=2, compute_s=0.03).step_s("dense", GIGABIT) == pytest.approx(0.03 + 0.0321 + 0.0121)


def test_compressed_step_is_the_offer_of_the_plan() -> None:
    one = training()
    offer = one.decisions[0].offer
    assert offer is not None
    sent = one.sent("dct", GIGABIT)
    assert sent.total == sent.gradients == sent.last == offer.traffic
    seconds = offer.traffic.hops * 50e-6 + float(offer.traffic.wire) / 1.25e8 + offer.traffic.memory_bytes / 8e9
    assert one.step_s("dct", GIGABIT) == pytest.approx(0.1 + seconds)
    assert one.step_s("dct", GIGABIT, late=True) == 0.1


@pytest.mark.parametrize("scheme", ["gather", "owner", "powersgd", "random_k"])
def test_crossing(scheme: str) -> None:
    one = training(gradient_scheme=scheme)
    offer = one.decisions[0].offer
    assert offer is not None
    assert offer.scheme == scheme
    dense, sent = offer.exchange.dense_traffic, offer.traffic
    # Both take as long where the bytes saved take as long as more hops and passes over memory.
    more_s = (sent.hops - dense.hops) * 50e-6 + sent.memory_bytes / 8e9
    crossing = one.crossing(GIGABIT, [GRADIENT])
    assert crossing == pytest.approx(float(dense.wire - sent.wire) / more_s, rel=0.011)
    assert [one.decided(Link(factor * crossing, 50e-6))[0].compressed for factor in (0.98, 1.02)] == [True, False]
    assert one.step_s("dct", Link(1.02 * crossing, 50e-6)) == one.step_s("dense", Link(1.02 * crossing, 50e-6))


def test_one_machine_stays_dense_for_its_own_reason() -> None:
    one = training()
    assert one.decided(ONE_MACHINE)[0].reason == Reason.ONE_MACHINE
    assert one.step_s("dct", ONE_MACHINE) == one.step_s("dense", ONE_MACHINE) == 0.1


def test_nothing_to_cross() -> None:
    assert training(dp_density=1).crossing(GIGABIT, [GRADIENT]) == 0
    assert training().crossing(GIGABIT, ["activation"]) == 0


def test_bytes_of_owner_do_not_grow_with_ranks() -> None:
    one = training(side=4000, gradient_scheme="owner")
    sent = {2**power: one.sent("dct", None, 2**power).gradients.wire_bytes for power in range(1, 11)}
    assert sent == {ranks: one.sent("owner", None, ranks).gradients.wire_bytes for ranks in sent}
    # As with the dense ring, a rank keeps its own share: that leaves (ranks - 1) / ranks.
    whole = [size * ranks / (ranks - 1) for ranks, size in sent.items()]
    assert max(whole) < 1.1 * min(whole)
    gathered = [one.sent("gather", None, ranks).gradients.wire_bytes for ranks in (2, 1024)]
    assert gathered[1] == 1023 * gathered[0]


def test_groups_that_average_gradients_keep_their_proportion() -> None:
    config = DCTConfig()
    both = Training([bucket(config, 100, ranks=2), bucket(config, 100, ranks=4)], config, 0.1)
    assert both.data_parallel_ranks == 2
    assert [exchange.ranks for exchange in both.exchanges(16)] == [16, 32]


def test_state_bytes() -> None:
    sizes = training().state_bytes(None)
    assert sizes["residual"] == 4_000_000
    assert sizes["threshold"] == 4
    assert sizes["copy for undo_discarded"] == sum(sizes.values()) / 2
    assert "copy for undo_discarded" not in training(undo_discarded=False).state_bytes(None)
    assert training().state_bytes(ONE_MACHINE) == {}


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_hook_of_the_users_stays_on_every_link() -> None:
    with fake_ranks(4):
        model = DistributedDataParallel(Affine())
        model.register_comm_hook(None, fp16_compress_hook)
        _, decisions = inspected(model, (torch.randn(2, 64),), {}, {"link": None})
    assert [decision.reason for decision in decisions] == [Reason.OWN_HOOK]
    one = Training(decisions, DCTConfig(), 0.1)
    assert one.sent("dct", Link(1e3)) == one.sent("dense") == one.sent("gather")
    assert one.sent("dense").gradients.wire_bytes == 2 * 3 * 4 * (64 * 64 + 64) // 4


def test_timing_changes_nothing() -> None:
    model = Affine()
    before = torch.random.get_rng_state()
    assert 0 < measured_compute_s(model, (torch.randn(2, 64),), {}) < 60
    assert all(parameter.grad is None for parameter in model.parameters())
    assert before.equal(torch.random.get_rng_state()) is False  # the input was drawn
    with pytest.raises(ValueError, match="no result of the model has a gradient"):
        measured_compute_s(lambda x: x.sum(), (torch.ones(2),), {})
    with pytest.raises(ValueError, match="on the device 'meta', where nothing is computed"):
        measured_compute_s(Affine().to("meta"), (torch.empty(2, 64, device="meta"),), {})


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="dct")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "users.py").write_text(USERS_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_command_says_what_inspection_says(folder: Path) -> None:
    arguments = ("users.py:wrapped", "--compute", "0.001", "--link", "10Mbit/s", "--scale", "--json", "out.json")
    result = invoke("advise", *arguments)
    assert result.exit_code == 0, result.output
    assert "users.py:wrapped, 4 ranks" in result.output
    assert "link: 10 Mbit/s, 50 us per hop, assumed\ncomputation: 1 ms per step, as given" in result.output
    assert "advice: backend=\"dct\", options={'link': '10Mbit/s'}" in result.output
    told_ = json.loads((folder / "out.json").read_text())
    assert invoke("inspect", "users.py:wrapped", "--options", "link=null", "--json", "sites.json").exit_code == 0
    report = json.loads((folder / "sites.json").read_text())
    for method, total in (("dense", report["dense_bytes"]), ("dct", report["wire_bytes"])):
        assert sum(kind[method]["bytes"] for kind in told_["traffic"].values()) == total
    rows = told_["traffic"]["activations and embeddings"]
    # Forward and backward: three quarters of 16 x 256 float32 leave a rank, in one hop.
    assert rows["dense"] == {"messages": 2, "bytes": 2 * 12288, "seconds": pytest.approx(2 * (12288 / 1.25e6 + 50e-6))}
    assert rows["dct"]["bytes"] < rows["dense"]["bytes"] / 5
    gradients = told_["traffic"]["gradients"]["dense"]
    assert gradients["bytes"] == 2 * 3 * 4 * (256 * 256 + 256) // 4
    assert told_["step_s"]["dense"] == pytest.approx(0.001 + rows["dense"]["seconds"] + gradients["seconds"])
    assert list(told_["scale"]) == [str(2**power) for power in range(1, 11)]
    assert told_["scale"]["4"]["dense"] == gradients


def test_command_advises_dense_on_a_fast_link(folder: Path) -> None:
    result = invoke(
        "advise", "users.py:wrapped", "--compute", 0.001, "--link", '{"bytes_per_s": 5e10, "latency_s": 1e-6}', "--json", "out.json"
    )
    assert result.exit_code == 0, result.output
    assert "advice: leave it dense. " in result.output
    told_ = json.loads((folder / "out.json").read_text())
    assert told_["options"] is None
    assert told_["state_bytes"] == {}
    assert told_["step_s"]["dct"] == told_["step_s"]["dense"]
    assert 0 < told_["crossing_bytes_per_s"]["gradients"] < 5e10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--link", "fast"], "--link 'fast' is neither a rate such as 1Gbit/s"),
        (["--link", '{"latency_s": 1e-5}'], "nor a mapping such as"),
        (["--ranks", "1"], "1 is not in the range x>=2"),
        (["--compute", "0"], "0.0 is not in the range x>0"),
        (["--options", "link=1Gbit/s"], "the link is said by --link, not by option link"),
        (["--options", "dp_densty=1"], "unknown option 'dp_densty'"),
        (["--picture", "missing/out.png"], "there is no folder"),
        (["dp_density=1"], "options of the backend follow --options"),
    ],
)
def test_usage_errors(folder: Path, arguments: list[str], words: str) -> None:
    result = invoke("advise", "users.py:wrapped", *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_ranks_of_the_launcher_cannot_be_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke("advise", "users.py:wrapped", "--ranks", 4)
    assert result.exit_code == 2
    assert "--ranks 4, but torchrun has started 2 ranks" in result.output


def test_link_needs_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("link")
    assert result.exit_code == 2
    assert "there is no RANK in the environment" in result.output
    for host in (0, 1):
        assert (
            f"--nnodes 2 --nproc-per-node 1 --node-rank {host} --master-addr HOST0 --master-port 29500 --no-python dct link"
            in result.output
        )
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone = invoke("link")
    assert alone.exit_code == 1
    assert "one rank alone has no link" in alone.output


def _told(rank: int, ranks: int) -> list[str]:
    assert dist.group.WORLD is not None
    return told(dist.group.WORLD)


@pytest.mark.distributed
def test_link_is_measured_alike_on_all_ranks(ranks2: Ranks) -> None:
    first, second = ranks2(_told)
    assert first == second
    assert first[0] == "link between 2 ranks, measured with all_gather over gloo"
    assert "All ranks are on one machine" in first[-2]
    name, _, value = first[-1].strip().partition("=")
    found = parse(parse_value(value))
    assert name == "link"
    assert found is not None
    assert math.isfinite(found.bytes_per_s)
    assert found.bytes_per_s > 1e5
