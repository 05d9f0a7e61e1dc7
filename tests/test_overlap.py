"""Exchanges of ``data_parallel`` run beside the backward, in the code that Inductor generates."""

import re

import torch
from torch import nn
from torch._inductor.utils import run_fw_bw_and_get_code

from dct_compile.backend import dct
from tests.tracing import fake_group


def test_an_exchange_starts_before_the_rest_of_the_backward() -> None:
    """Products of matrices stand between the start of the first exchange and its wait. In this model Inductor would sink the start."""
    torch._dynamo.reset()
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(512, 512), nn.ReLU())))
    with fake_group(2):
        compiled = torch.compile(model, backend=dct, options={"data_parallel": True, "link": "1Mbit/s"})
        _, (_, backward) = run_fw_bw_and_get_code(lambda: compiled(torch.randn(2048, 512)))
    assert isinstance(backward, str)
    calls = re.findall(r"^ *(?:buf\d+ = )?(torch\.ops\.[\w.]+|extern_kernels\.\w+)\(", backward, re.MULTILINE)
    start, wait = (calls.index(f"torch.ops._c10d_functional.{name}.default") for name in ("all_gather_into_tensor", "wait_tensor"))
    assert calls[start:wait].count("extern_kernels.mm") >= 4
