"""How ``dct bench kernels`` measures: turns, samples, copies beyond the caches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dct_compile.bench import kernels, machine
from dct_compile.bench.cases import CASES, Case
from dct_compile.bench.inputs import Problem
from dct_compile.bench.kernels import OP, Bench, Measurement
from dct_compile.bench.results import step_overheads, warmup_refreshes
from dct_compile.bench.timing import MOST_SAMPLES, Contender, Stopwatch, Timing, interleaved, summarise
from dct_compile.triton_kernels.cpu.build import load_library

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--size", "2^14", "--seconds", "0.001"]
compiled = pytest.mark.skipif(load_library() is None, reason="no C++ compiler")


def _case(op: str, variant: str) -> Case:
    (case,) = (case for case in CASES if (case.op_name, case.variant) == (op, variant))
    return case


def test_a_step_is_compared_with_a_dense_all_reduce() -> None:
    problem = Problem(2**20, 2**20, 0.01, torch.float32, CPU)
    copy = Timing(2.0, 2.0, 2.0, 3)  # 20 MB in 2 ms: 10 GB/s

    def measured(op: str, variant: str, ms: float) -> Measurement:
        return Measurement(_case(op, variant), problem, timings={OP: Timing(ms, ms, ms, 3), "copy": copy}, copy_bytes=20_000_000)

    parts = [measured("select_threshold", "exact", 50.0), measured("threshold_pack", "error feedback", 1.0)]
    assert step_overheads(parts) == []
    (step,) = step_overheads([*parts, measured("unpack_accumulate", "2 payloads", 0.5)])
    assert step.steady_ms == pytest.approx(0.05 + 1.0 + 0.5)
    assert step.all_reduce_ms == pytest.approx(20 * 2**20 / 10e9 * 1e3)
    assert step.warmup_ms == pytest.approx(warmup_refreshes() * 0.05 + 1.5)


def test_refreshes_of_the_warmup() -> None:
    """Gaps 1 up to step 15, then 2, 4, 8, 16, 32 and 64 for 16, 32, ... steps: 8 refreshes for each doubling."""
    assert warmup_refreshes() == 16 + 5 * 8 + 8


def test_contenders_take_turns_on_their_copies() -> None:
    seen: list[tuple[str, int]] = []
    restored: list[int] = []
    contenders = {
        "op": Contender(lambda copy: seen.append(("op", copy)), 3, restored.append),
        "slow": Contender(lambda copy: seen.append(("slow", copy)), 3),
    }
    timings = interleaved(contenders, Stopwatch(CPU), 10.0)
    assert all(timing.samples == MOST_SAMPLES for timing in timings.values())
    assert [name for name, _ in seen] == ["op", "slow"] * (MOST_SAMPLES + 1)
    assert [copy for _, copy in seen] == [turn % 3 for turn in range(len(seen))]
    assert restored == [copy for name, copy in seen if name == "op"]


def test_the_number_of_samples_is_not_taken_from_the_first_run() -> None:
    """Which pays for compilation and for memory that is fresh from the system."""

    class Scripted(Stopwatch):
        def milliseconds(self, call: Callable[[], object]) -> float:
            call()
            return 1000.0 if len(calls) == 1 else 1.0

    calls: list[int] = []
    timings = interleaved({"op": Contender(calls.append, 1)}, Scripted(CPU), 0.02)
    assert timings["op"] == Timing(1.0, 1.0, 1.0, 20)
    assert len(calls) == 21


def test_free_memory_is_looked_at_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look gives kept memory back to the system."""
    looks: list[torch.device] = []

    def available_bytes(device: torch.device) -> int:
        looks.append(device)
        return 2**40

    monkeypatch.setattr(kernels, "available_bytes", available_bytes)
    bench = Bench(Stopwatch(CPU), 0.001, inductor=False)
    for numel in (2**12, 2**12, 2**13):
        bench.measure(_case("dequantize_rows", "int8"), Problem(numel, 64, 1.0, torch.float32, CPU))
    assert looks == [CPU, CPU]


def test_summary() -> None:
    assert summarise([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Timing(3.5, 2.0, 5.0, 6)


def test_copies_exceed_the_cache() -> None:
    stopwatch = Stopwatch(CPU)
    for size in (2**18, 2**24, 2**34):
        assert stopwatch.copies(size) * size >= 4 * stopwatch.cache_bytes


def test_the_last_level_cache_is_read_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CPUs on one 16 MiB cache, a third on another one."""
    for cpu, shared in enumerate(("0-1", "0-1", "2")):
        for index, (level, size, cpus) in enumerate([("1", "48K", str(cpu)), ("2", "1M", str(cpu)), ("3", "16384K", shared)]):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", cpus)):
                (folder / name).write_text(f"{text}\n")
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    assert machine.last_level_cache_bytes(CPU) == 32 * 2**20
    for size in tmp_path.glob("cpu*/cache/index2/size"):
        size.write_text("480M\n")
    assert machine.last_level_cache_bytes(CPU) == machine.LARGEST_CACHE_BYTES
    monkeypatch.setattr(machine, "_CPUS", tmp_path / "nothing")
    assert machine.last_level_cache_bytes(CPU) == machine.LARGEST_CACHE_BYTES
