"""Payloads of random bytes: no decoder may read or write memory that is not its own, in any implementation."""

from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.build import load_library
from tests.processes import run_python


def test_no_decoder_leaves_its_memory() -> None:
    """In a process of its own, which a fault would end."""
    done = run_python("import faulthandler; faulthandler.enable(); from tests.damaged_payloads import main; main()", TRITON_INTERPRET="1")
    expected = ["reference", *["cpu"] * (load_library() is not None), *["triton"] * HAS_TRITON]
    assert done.stdout.split() == expected
