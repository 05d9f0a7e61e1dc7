"""Torch's own tools on gloo ranks: generated code and profiles name the sites of compressed collectives."""

import itertools
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

from dct_compile.backend import dct
from dct_compile.triton_kernels.layout import RowLayout
from tests.rank_pool import Ranks
from tests.ranks_ddp import Exchanging, Net, batch, ddp_of, loss_of

ROW_LAYOUT = RowLayout((32,), 4, torch.float32)


def ranges(profiler: profile) -> list[tuple[str, float, float]]:
    """Returns (name, start, end) in microseconds of this project's ranges, in order of their start."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    found = [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") == "user_annotation"]
    return sorted([item for item in found if item[0].startswith("dct::")], key=lambda item: item[1])


def inspected(rank: int, world_size: int) -> tuple[list[str], list[tuple[str, float, float]]]:
    """Returns the code of a compiled model's graphs, and the ranges of one of its steps."""
    compiled = torch.compile(Exchanging(), backend=dct, options={"data_parallel": True, "gradient_scheme": "owner"})

    def step() -> None:
        loss_of(compiled(batch(rank, 0))).backward()

    _, code = run_and_get_code(step)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return code, ranges(profiler)


EXCHANGE = re.escape("ranks_ddp.py:") + r"\d+"
GRADIENTS = re.escape("top.bias +3")
COLLECTIVE = re.compile(r"= torch\.ops\._c10d_functional\.(?!wait_tensor)")


def lines_of(code: list[str]) -> tuple[list[str], list[int], list[int]]:
    """Returns the code's lines, and which of them call this project's operators and collectives."""
    lines = [line.strip() for graph in code for line in graph.splitlines() if not line.strip().startswith(("assert", "# buffer"))]
    calls = [position for position, line in enumerate(lines) if "torch.ops.dct." in line]
    return lines, calls, [position for position, line in enumerate(lines) if COLLECTIVE.search(line)]


@pytest.mark.distributed
def test_calls_in_generated_code_name_their_sites(ranks2_once: Ranks) -> None:
    for code, _ in ranks2_once(inspected):
        lines, calls, _ = lines_of(code)
        assert len(calls) == 8
        assert all(re.search(rf"site='({EXCHANGE}( backward)?|{GRADIENTS})'", lines[position]) for position in calls)


@pytest.mark.distributed
def test_comments_in_generated_code_name_the_sites(ranks2_once: Ranks) -> None:
    """Under "owner", the gradient's payload is exchanged twice; what stays dense rides behind it."""
    for code, _ in ranks2_once(inspected):
        lines, calls, collectives = lines_of(code)
        assert len(collectives) == 4
        for position in [*calls, *collectives]:
            comment = next(line for line in reversed(lines[:position]) if "Source Nodes" in line)
            assert re.search(rf"\[({EXCHANGE}( backward)?|{GRADIENTS})\]", comment), (comment, lines[position])


@pytest.mark.distributed
def test_profiles_name_the_sites(ranks2_once: Ranks) -> None:
    forward, backward = f"{EXCHANGE}$", f"{EXCHANGE} backward$"
    expected = [
        *(f"pack_rows {forward}", f"all_to_all_single {forward}", f"unpack_rows {forward}"),
        *(f"gather_rows {backward}", f"all_to_all_single {backward}", f"scatter_rows {backward}"),
        *(f"select_threshold {GRADIENTS}$", f"threshold_pack {GRADIENTS}$", f"all_to_all_single {GRADIENTS}$"),
        *(f"repack {GRADIENTS}$", f"all_gather_into_tensor {GRADIENTS}$", f"unpack_accumulate {GRADIENTS}$"),
    ]
    for _, shown in ranks2_once(inspected):
        assert_ranges(shown, expected)


def ddp_ranges(rank: int, world_size: int) -> list[tuple[str, float, float]]:
    _, compiled = ddp_of(Net(), {}, inside=False)
    loss_of(compiled(batch(rank, 0))).backward()
    loss_of(compiled(batch(rank, 1))).backward()
    with profile(activities=[ProfilerActivity.CPU], experimental_config=_ExperimentalConfig(profile_all_threads=True)) as profiler:
        loss_of(compiled(batch(rank, 2))).backward()
    return ranges(profiler)


@pytest.mark.distributed
def test_profiles_of_all_threads_show_ddps_buckets(ranks2: Ranks) -> None:
    label = re.escape("bottom.weight +7")
    names = ("select_threshold", "threshold_pack", "all_gather_into_tensor", "unpack_into")
    for shown in ranks2(ddp_ranges):
        assert_ranges(shown, [f"{name} {label}$" for name in names])


def assert_ranges(shown: list[tuple[str, float, float]], expected: list[str]) -> None:
    """Asserts one range for each pattern, in this order and one after the other."""
    assert len(shown) == len(expected), shown
    for (name, _, _), pattern in zip(shown, expected, strict=True):
        assert re.match(f"dct::{pattern}", name), (name, pattern)
    assert all(end <= start for (_, _, end), (_, start, _) in itertools.pairwise(shown))


def test_exchanges_may_overlap() -> None:
    """The second is sent before the first is received; both end where their own result is unpacked."""
    x = torch.randn(4, 32)

    def pack(site: str) -> Tensor:
        return torch.ops.dct.pack_rows(x, ROW_LAYOUT, "exact", 0.1, 0.0, site=site, sends="all_to_all_single")

    def unpack(payload: Tensor, site: str) -> Tensor:
        return torch.ops.dct.unpack_rows(payload, ROW_LAYOUT, 1, torch.float32, site=site, receives="all_to_all_single")

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        first, second = pack("a"), pack("b")
        results = unpack(first, "a"), unpack(second, "b")
    assert torch.equal(*results)
    found = {name: (start, end) for name, start, end in ranges(profiler)}
    assert found["dct::pack_rows a"][1] <= found["dct::all_to_all_single a"][0] <= found["dct::pack_rows b"][0]
    assert found["dct::all_to_all_single a"][1] <= found["dct::unpack_rows a"][0] < found["dct::all_to_all_single b"][1]
    assert found["dct::all_to_all_single b"][1] <= found["dct::unpack_rows b"][0]


def test_a_profiler_that_starts_in_the_middle_sees_no_half_exchange() -> None:
    payload = torch.ops.dct.pack_rows(torch.randn(4, 32), ROW_LAYOUT, "exact", 0.1, 0.0, site="a", sends="all_to_all_single")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ops.dct.unpack_rows(payload, ROW_LAYOUT, 1, torch.float32, site="a", receives="all_to_all_single")
    assert [name for name, _, _ in ranges(profiler)] == ["dct::unpack_rows a"]
