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
from torch.utils._pytree import tree_leaves

from dct_compile import ops
from dct_compile.bench import kernels
from dct_compile.bench.cases import BASELINES, CASES, Case
from dct_compile.bench.inputs import Problem, Source
from dct_compile.bench.kernels import Bench, MismatchError, check
from dct_compile.bench.results import COLUMNS
from dct_compile.bench.timing import FEWEST_SAMPLES, Stopwatch
from dct_compile.cli import extras
from dct_compile.cli.bench import OPS
from dct_compile.cli.main import main
from dct_compile.triton_kernels.cpu import gradient, moments, rows
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
    assert {case.op_name for case in CASES} == names == set(ops.__all__) == set(OPS)
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
        (["--seconds", "nan"], "nan is not a finite number"),
        (["--seconds", "inf"], "inf is not a finite number"),
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
def test_a_folder_that_takes_no_file_is_an_error() -> None:
    result = _invoke(*TINY, "--out", "/proc")
    assert result.exit_code == 2
    assert "cannot write /proc/kernels-cpu.csv: No such file or directory" in result.output


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
    function = getattr(gradient, name, None) or getattr(rows, name, None) or getattr(moments, name, store_reference)
    mutated = [i for i, argument in enumerate(op._schema.arguments) if argument.alias_info is not None]

    def wrong(*arguments: Any) -> Any:
        result = function(*arguments)
        target = tree_leaves(arguments[mutated[0]])[0] if result is None else result
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
