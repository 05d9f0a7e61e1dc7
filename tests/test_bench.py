"""``dct bench kernels``: that it covers every op, counts bytes rightly, and does not print times of wrong kernels."""

import csv
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from dct_compile import ops
from dct_compile.bench import kernels, machine
from dct_compile.bench.cases import BASELINES, CASES, Case
from dct_compile.bench.inputs import Problem, Source
from dct_compile.bench.kernels import OP, Bench, Measurement, MismatchError, check
from dct_compile.bench.results import COLUMNS, step_overheads, warmup_refreshes
from dct_compile.bench.timing import FEWEST_SAMPLES, MOST_SAMPLES, Contender, Stopwatch, Timing, interleaved, summarise
from dct_compile.cli import extras
from dct_compile.cli.main import main
from dct_compile.triton_kernels.cpu import gradient, rows
from dct_compile.triton_kernels.cpu.build import load_library
from dct_compile.triton_kernels.store import store_reference

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--size", "2^14", "--seconds", "0.001"]
compiled = pytest.mark.skipif(load_library() is None, reason="no C++ compiler")


def _invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", "kernels", *map(str, arguments)])


def _case(op: str, variant: str) -> Case:
    (case,) = (case for case in CASES if (case.op_name, case.variant) == (op, variant))
    return case


def _read(folder: Path) -> list[dict[str, str]]:
    with (folder / "kernels-cpu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_op_has_a_case() -> None:
    names = {name.removeprefix("dct::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("dct::")}
    assert {case.op_name for case in CASES} == names == set(ops.__all__)
    assert all(set(case.baselines) <= set(BASELINES) - {"inductor"} for case in CASES)
    assert len({(case.op_name, case.variant) for case in CASES}) == len(CASES)


@compiled
@pytest.mark.slow
def test_a_whole_run(tmp_path: Path) -> None:
    result = _invoke(*TINY, "--no-inductor", "--density", "0.01", "--dtype", "float32", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    table = _read(tmp_path)
    assert tuple(table[0]) == COLUMNS
    *measured, step = table
    assert {row["op"] for row in measured} == set(ops.__all__)
    assert len(measured) == sum(max(len(case.widths), 1) for case in CASES)
    for row in measured:
        assert row["status"] == "ok"
        assert row["checked_numel"] == row["numel"] == "16384"
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert int(row["samples"]) >= FEWEST_SAMPLES
        bandwidth = int(row["floor_bytes"]) / float(row["median_ms"]) * 1e3
        assert float(row["bytes_per_s"]) == pytest.approx(bandwidth)
        assert float(row["percent_of_copy"]) == pytest.approx(100 * bandwidth / float(row["copy_bytes_per_s"]))
        assert float(row["vs_add"]) > 0
        case = _case(row["op"], row["variant"])
        assert {name for name in BASELINES if row[f"{name}_ms"]} == set(case.baselines)
        for name in case.baselines:
            assert float(row[f"speedup_{name}"]) == pytest.approx(float(row[f"{name}_ms"]) / float(row["median_ms"]))
        assert all(row[name] for name in ("date", "device_name", "threads", "memory", "torch", "python"))
    assert step["op"] == "data-parallel step"
    assert float(step["share_of_all_reduce"]) == pytest.approx(float(step["median_ms"]) / float(step["all_reduce_ms"]))
    assert (tmp_path / "kernels-cpu.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "threshold_pack, error feedback" in result.output
    assert "reduce: read 2, write 1; gather: read 1, write 1" in result.output


@compiled
@pytest.mark.slow
def test_inductor_is_a_baseline(tmp_path: Path) -> None:
    result = _invoke(*TINY, "--density", "0.01", "--dtype", "float32", "--op", "threshold_pack", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (row,) = _read(tmp_path)
    assert float(row["speedup_inductor"]) == pytest.approx(float(row["inductor_ms"]) / float(row["median_ms"]))
    assert row["eager_ms"]
    assert row["topk_ms"]


@compiled
def test_options_choose_what_is_measured(tmp_path: Path) -> None:
    chosen = ["--density", "0.05", "--density", "0.25", "--dtype", "bfloat16", "--op", "pack_rows", "--quick"]
    result = _invoke(*TINY, *chosen, "--size", "32768", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    table = _read(tmp_path)
    assert {row["op"] for row in table} == {"pack_rows"}
    assert {row["density"] for row in table} == {"0.05", "0.25"}
    assert {row["dtype"] for row in table} == {"bfloat16"}
    assert {row["numel"] for row in table} == {"16384", "32768"}
    assert {row["width"] for row in table} == {"256"}
    assert len(table) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "2^13"], "'2^13' is not a power of two from 2^14 to 2^30"),
        (["--size", "2^31"], "'2^31' is not a power of two"),
        (["--size", "1000000"], "'1000000' is not a power of two"),
        (["--size", "big"], "'big' is not a power of two"),
        (["--density", "1"], "1.0 is not in the range 0<x<1"),
        (["--density", "0"], "0.0 is not in the range 0<x<1"),
        (["--dtype", "float16"], "'float16' is not one of 'float32', 'bfloat16'"),
        (["--op", "pack"], "'pack' is not one of"),
        (["--seconds", "0"], "0.0 is not in the range x>0"),
        (["--device", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
    ],
)
def test_bad_values_are_usage_errors(arguments: list[str], message: str) -> None:
    result = _invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", "").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_an_error() -> None:
    result = _invoke("--device", "cuda")
    assert result.exit_code == 2
    assert "torch finds no CUDA device" in result.output


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    result = _invoke(*TINY)
    assert result.exit_code == 1
    assert "tqdm, matplotlib not installed: pip install 'dct-compile[demo]'" in result.output


@compiled
def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = _invoke(*TINY, "--out", tmp_path / "file" / "below")
    assert result.exit_code == 2
    assert "cannot write to" in result.output


@compiled
def test_what_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available_bytes", lambda device: 2**30)
    arguments = ["--device", "cpu", "--op", "pack_rows", "--dtype", "float32", "--density", "0.01", "--seconds", "0.001", "--out", tmp_path]
    result = _invoke(*arguments, "--size", "2^14", "--size", "2^30")
    assert result.exit_code == 0, result.output
    by_size = {row["numel"]: row for row in _read(tmp_path)}
    assert by_size[str(2**14)]["status"] == "ok"
    large = by_size[str(2**30)]
    assert re.fullmatch(r"does not fit: needs \d+\.\d GiB, \d\.\d GiB are free", large["status"])
    assert large["median_ms"] == ""
    assert large["checked_numel"] == "0"
    assert large["status"] in result.output
    nothing = _invoke(*arguments, "--size", "2^30")
    assert nothing.exit_code == 1
    assert "nothing was measured" in nothing.output


def _slightly_wrong(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The op's CPU function with one bit flipped in its result, or in the first tensor that it mutates."""
    name = f"{op.overloadpacket.__name__}_cpu"
    function = getattr(gradient, name, None) or getattr(rows, name, store_reference)
    mutated = [i for i, argument in enumerate(op._schema.arguments) if argument.alias_info is not None]

    def wrong(*arguments: Any) -> Any:
        result = function(*arguments)
        target = arguments[mutated[0]] if result is None else result
        target.view(-1).view(torch.uint8)[0] ^= 1
        return result

    return wrong


@compiled
@pytest.mark.parametrize("name", ops.__all__)
def test_a_wrong_kernel_ends_the_run(name: str, tmp_path: Path) -> None:
    first = next(case for case in CASES if case.op_name == name)
    with torch.library._scoped_library("dct", "IMPL") as library:
        library.impl(name, _slightly_wrong(first.op), "CPU", allow_override=True)
        result = _invoke(*TINY, "--density", "0.01", "--dtype", "bfloat16", "--op", name, "--out", tmp_path)
    assert result.exit_code == 1
    width, density = (first.widths or (2**14,))[0], "0.01" if first.has_density else "1"
    sizes = f"16384 elements in rows of {width}, density {density}, bfloat16"
    assert f"{name} ({first.variant}) differs from its reference: {sizes}" in result.output
    assert _read(tmp_path) == []


def test_a_wrong_residual_is_found_too() -> None:
    case = _case("threshold_pack", "error feedback")

    def wrong(grad: torch.Tensor, residual: torch.Tensor, *rest: Any) -> torch.Tensor:
        payload = case.reference(grad, residual, *rest)
        residual[7] += 1
        assert isinstance(payload, torch.Tensor)
        return payload

    problem = Problem(2**14, 2**14, 0.01, torch.float32, CPU)
    check(case, problem, Source())
    with pytest.raises(MismatchError, match=r"threshold_pack \(error feedback\) differs from its reference: 16384 elements"):
        check(replace(case, reference=wrong), problem, Source())


def test_large_problems_are_checked_at_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGEST_CHECK", 2**12)
    checked: list[int] = []
    monkeypatch.setattr(kernels, "check", lambda case, problem, source: checked.append(problem.numel))
    bench = Bench(Stopwatch(CPU), 0.001, inductor=False)
    case = _case("dequantize_rows", "int8")
    for numel in (2**14, 2**15):
        assert bench.measure(case, Problem(numel, 64, 1.0, torch.float32, CPU)).checked_numel == 2**12
    assert checked == [2**12]


FLOORS = [
    # op, variant, width, density, dtype, bytes of 2^16 elements
    ("select_threshold", "exact", 0, 0.01, torch.float32, 65536 * 8),
    ("select_threshold", "laplace", 0, 0.01, torch.bfloat16, 65536 * 6),
    ("select_threshold", "sampled", 0, 0.01, torch.float32, 65536 * 8),  # small enough to look at all
    ("select_threshold", "not due", 0, 0.01, torch.float32, 32),
    # 721 entries of 2 + 1 bytes, 256 counts, padding to 4
    ("threshold_pack", "error feedback", 0, 0.01, torch.float32, 65536 * 12 + 2420),
    ("threshold_pack", "error feedback", 0, 0.01, torch.bfloat16, 65536 * 10 + 2420),
    # 73 entries of 2 + 2 bytes, 16 counts of 2 bytes
    ("threshold_pack", "error feedback", 0, 0.001, torch.float32, 65536 * 12 + 324),
    ("unpack_accumulate", "2 payloads", 0, 0.01, torch.float32, 65536 * 4 + 2 * 2420),
    ("unpack_accumulate", "8 payloads", 0, 0.01, torch.bfloat16, 65536 * 2 + 8 * 2420),
    ("repack", "4 payloads", 0, 0.01, torch.float32, 65536 * 8 + 5 * 2420),
    # 256 rows of 13 entries of 2 + 1 bytes; 4 rows of 820 entries of 2 + 2 bytes
    ("pack_rows", "exact", 256, 0.05, torch.float32, 65536 * 4 + 256 * 39),
    ("pack_rows", "exact", 16384, 0.05, torch.bfloat16, 65536 * 2 + 4 * 3280),
    ("pack_rows", "laplace", 256, 0.05, torch.float32, 65536 * 4 + 256 * 45),  # 15 entries
    ("unpack_rows", "1 payload", 256, 0.05, torch.float32, 65536 * 4 + 256 * 39),
    ("gather_rows", "1 payload", 256, 0.05, torch.float32, round(65536 * 4 * (1 - (243 / 256) ** 16)) + 256 * 13 * 3),
    ("gather_rows", "1 payload", 16384, 0.05, torch.bfloat16, round(65536 * 2 * (1 - (15564 / 16384) ** 32)) + 4 * 820 * 4),
    ("scatter_rows", "1 payload", 16384, 0.05, torch.float32, 65536 * 4 + 4 * 3280),
    ("quantize_rows", "int8", 64, 1.0, torch.float32, 65536 * 4 + 1024 * 66),
    ("quantize_rows", "int4", 64, 1.0, torch.bfloat16, 65536 * 2 + 1024 * 34),
    ("dequantize_rows", "int8", 1024, 1.0, torch.float32, 65536 * 4 + 64 * 1026),
    ("store", "one tensor", 0, 1.0, torch.bfloat16, 2 * 65536 * 2),
]


@pytest.mark.parametrize(("op", "variant", "width", "density", "dtype", "expected"), FLOORS)
def test_floor_bytes(op: str, variant: str, width: int, density: float, dtype: torch.dtype, expected: int) -> None:
    problem = Problem(2**16, width or 2**16, density, dtype, CPU)
    assert _case(op, variant).floor_bytes(problem) == expected


@pytest.mark.parametrize(("dtype", "bytes_per_group"), [(torch.float32, 64 + 64), (torch.bfloat16, 64 + 64)])
def test_floor_bytes_of_samples(dtype: torch.dtype, bytes_per_group: int) -> None:
    """Every 31st of 262,144 groups of 16. One of bfloat16 is half a line, which is read as a whole."""
    problem = Problem(2**22, 2**22, 0.01, dtype, CPU)
    assert _case("select_threshold", "sampled").floor_bytes(problem) == 8457 * bytes_per_group


def test_every_case_has_a_worked_floor() -> None:
    assert {case.op_name for case in CASES} == {floor[0] for floor in FLOORS}


@pytest.mark.parametrize("case", [case for case in CASES if case.baselines], ids=lambda case: f"{case.op_name}-{case.variant}")
def test_baselines_do_the_work_of_the_op(case: Case) -> None:
    """Their results hold as many entries as the op keeps, or the same dense values up to rounding."""
    width = (case.widths or (2**14,))[0]
    problem = Problem(2**14, width, 0.05 if case.has_density else 1.0, torch.float32, CPU)
    made = case.make(problem, Source())
    results = [chain(*made.operands) for chain in case.baselines.values()]
    result = case.op(*made.arguments)
    for mine in results:
        if case.op_name == "select_threshold":
            torch.testing.assert_close(mine, made.arguments[2][0])
        elif case.op_name in ("unpack_accumulate", "unpack_rows", "gather_rows", "scatter_rows", "dequantize_rows"):
            torch.testing.assert_close(mine.view(-1), result.view(-1), rtol=1e-2, atol=1e-2)
        elif case.op_name == "repack":
            steps, kept, *_ = made.arguments[3][0].tolist()  # of the call that chose the threshold, and of this one
            assert mine[0].numel() == mine[1].numel() == kept / steps
        elif case.op_name in ("threshold_pack", "pack_rows"):
            assert mine[0].numel() == mine[1].numel() == problem.rows * problem.kept
        else:
            assert mine[0].nbytes + mine[1].nbytes == result.nbytes


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
