"""The bytes that each kernel must move at least, and the baselines beside the kernels."""

import pytest
import torch

from dct_compile.bench.cases import CASES, Case
from dct_compile.bench.inputs import Problem, Source
from dct_compile.triton_kernels.cpu.build import load_library

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--size", "2^14", "--seconds", "0.001"]
compiled = pytest.mark.skipif(load_library() is None, reason="no C++ compiler")


def _case(op: str, variant: str) -> Case:
    (case,) = (case for case in CASES if (case.op_name, case.variant) == (op, variant))
    return case


FLOORS = [
    # op, variant, width, density, dtype, bytes of 2^16 elements
    ("select_threshold", "exact", 0, 0.01, torch.float32, 65536 * 8),
    ("select_threshold", "laplace", 0, 0.01, torch.bfloat16, 65536 * 6),
    ("select_threshold", "sampled", 0, 0.01, torch.float32, 65536 * 8),  # small enough to look at all
    ("select_threshold", "not due", 0, 0.01, torch.float32, 40),
    # 721 entries of 2 + 1 bytes, 256 counts, padding to 4
    ("threshold_pack", "error feedback", 0, 0.01, torch.float32, 65536 * 12 + 2420),
    ("threshold_pack", "error feedback", 0, 0.01, torch.bfloat16, 65536 * 10 + 2420),
    # 73 entries of 2 + 2 bytes, 16 counts of 2 bytes
    ("threshold_pack", "error feedback", 0, 0.001, torch.float32, 65536 * 12 + 324),
    ("unpack_accumulate", "2 payloads", 0, 0.01, torch.float32, 65536 * 4 + 2 * 2420),
    ("unpack_accumulate", "8 payloads", 0, 0.01, torch.bfloat16, 65536 * 2 + 8 * 2420),
    ("unpack_into", "2 payloads", 0, 0.01, torch.float32, 65536 * 4 + 2 * 2420),
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
    ("prepare_moments", "first moment", 0, 0.01, torch.float32, 2 * 65536 * 4),
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
