"""Messages of a pipeline that stay dense, and pipelines whose stages are not alike: dense for a reason or an error, never a hang."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline

import dct_compile
from dct_compile.backend import dct
from dct_compile.reasons import Reason
from dct_compile.runtime import RUNTIME
from dct_compile.schemes.quantized import NARROWEST
from tests.rank_pool import Ranks
from tests.ranks_pipeline import BATCH, CHUNKS, WIDTH, Block, Pipe, batch, decoded, loss_of, sites
from tests.torch_versions import needs_torch

pytestmark = pytest.mark.distributed
BESIDE = 4
needs_missing_gradients = needs_torch("2.13", "its pipelines need a gradient for each input of a stage")
INT8 = Reason.QUANTIZED.format(bits=8)


class Several(Block):
    """Passes on a hidden state, and beside it tensors that no scheme for rows carries."""

    def forward(self, x: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        h = super().forward(x)
        if beside:
            h = h + beside[0] + beside[1].square().sum(-1, keepdim=True) + beside[2].square().unsqueeze(-1) + beside[3]
        return h, (h > 0).long(), h[:, : NARROWEST - 1].contiguous(), h.sum(-1), h * 0.5


def several(rank: int, world_size: int) -> tuple[list[Tensor], list[tuple[str, str, str]], int]:
    """Returns what the stage of this rank got or gave in the third step, its rows of the report, and the entries after its end."""
    pipe = Pipe(make=Several, options={"exempt": ["*, tensor 4"]})
    for step in range(3):
        pipe.step(*batch(step))
    passed = pipe.recorded[rank].passed
    kept = (passed.outputs if rank == 0 else passed.inputs)[-CHUNKS * (1 + BESIDE) :]
    rows = [(site.name, site.kind, str(site.reason)) for site in sites()]
    del pipe
    gc.collect()
    torch.compile(Block(), backend=dct, options={"data_parallel": True})(torch.randn(8, WIDTH)).sum().backward()
    return kept, rows, len(sites())


@needs_missing_gradients
def test_each_tensor_of_an_output_has_its_own_reason(ranks2: Ranks) -> None:
    (outputs, sent, left), (inputs, returned, _) = ranks2(several)
    edge = "stage 0 to stage 1"
    names = [edge, *(f"{edge}, tensor {number}" for number in range(1, 1 + BESIDE))]
    narrow = Reason.NARROW_ROW.format(width=NARROWEST - 1)
    reasons = [INT8, Reason.DTYPE.format(dtype="int64"), narrow, Reason.NO_ROWS, Reason.EXEMPT.format(pattern="*, tensor 4")]
    assert sent == [(name, "activation", reason) for name, reason in zip(names, reasons, strict=True)]
    with_gradient = [(name, reason) for name, reason in zip(names, reasons, strict=True) if "int64" not in reason]
    assert returned == [(name, "activation_gradient", reason) for name, reason in with_gradient]
    for place, (here, there) in enumerate(zip(outputs, inputs, strict=True)):
        assert torch.equal(there, here if place % (1 + BESIDE) else decoded(here))
    assert left == 0  # a pipeline that is gone is not in the report


def ended(rank: int, world_size: int, case: str) -> tuple[list[bool], list[str], list[str]]:
    """Returns whether the first message of each of five steps was encoded, the reasons in the report, and its notes."""
    compiles = {"neighbour": rank == 0, "late": rank == 0}.get(case, True)
    RUNTIME.links.auto = "auto" if case == "one machine" else None
    pipe = Pipe(compiles=lambda index: compiles, loss=loss_of)
    if case == "frozen" and rank == 0:
        pipe.modules[0].requires_grad_(False)
    encoded = []
    for step in range(6):
        if case == "late" and rank == 1 and step == 1:
            pipe.recorded[1].module = torch.compile(pipe.modules[1], backend=dct)
        if case == "evaluation":
            pipe.evaluate(*batch(step))
        else:
            pipe.step(*batch(step))
        ends = pipe.passed()[rank]
        everyone: list[Any] = [None] * 2
        torch.distributed.all_gather_object(everyone, (ends.outputs if rank == 0 else ends.inputs)[0])
        encoded.append(not torch.equal(*everyone))
        if encoded[-1]:
            assert torch.equal(everyone[1], decoded(everyone[0]))
    return encoded, [site.reason for site in sites()], list(dct_compile.report().notes)


def lacking(stage: int) -> str:
    return Reason.PIPELINE_LACKS.format(stages=f"stage {stage}")


CASES = {
    "neighbour": (6, lacking(1)),
    "frozen": (6, lacking(0)),
    "evaluation": (6, Reason.PIPELINE_STARTS),
    "one machine": (6, Reason.ONE_MACHINE),
    "late": (3, INT8),
}
"""The number of dense steps, and the reason at the end."""


@pytest.mark.parametrize("case", [pytest.param(case, marks=needs_missing_gradients) if case == "frozen" else case for case in CASES])
def test_a_pipeline_is_dense_until_all_stages_are_there(ranks2: Ranks, case: str) -> None:
    """``late``: the second stage is compiled from the second step on."""
    dense_steps, reason = CASES[case]
    results = ranks2(ended, case)
    assert [encoded for encoded, _, _ in results] == [[step >= dense_steps for step in range(6)]] * 2
    assert results[0][2] == []  # nobody has to average the gradients of stages
    reasons = {found for _, rows, _ in results for found in rows}
    assert reasons == {reason}


def disagreeing(rank: int, world_size: int) -> str:
    pipe = Pipe(options={"exempt": ["stage 0*"]} if rank else {})
    for step in range(2):
        pipe.step(*batch(step))
    with pytest.raises(RuntimeError, match="would compress differently") as raised:
        pipe.step(*batch(2))
    return str(raised.value)


def test_other_options_are_an_error_of_both_stages(ranks2: Ranks) -> None:
    for message in ranks2(disagreeing):
        assert "option 'exempt' is" in message
        assert "'pipeline' (messages of 2 stages)" in message


def with_codec(rank: int, world_size: int, codecs: tuple[Any, ...]) -> list[list[str]]:
    """Returns the reasons in the report after three steps, for each value of ``activation_codec``."""
    reasons = []
    for codec in codecs:
        pipe = Pipe(options={"activation_codec": codec})
        for step in range(3):
            pipe.step(*batch(step))
        reasons.append([str(site.reason) for site in sites()])
        dct_compile.reset_report()
    return reasons


def test_the_codec_of_activations_is_that_of_messages(ranks2: Ranks) -> None:
    codecs = ("int4", "threshold", "dense", {"stage 0*": "int4"})
    expected = [
        Reason.QUANTIZED.format(bits=4),
        Reason.MESSAGE_CODEC,
        Reason.CODEC_DENSE.format(option="activation_codec"),
        Reason.QUANTIZED.format(bits=4),
    ]
    assert ranks2(with_codec, codecs) == [[[reason] for reason in expected]] * 2


class Joins(nn.Module):
    """Adds what has skipped a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(2)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        return self.block(x) + skipped


class Skipping(nn.Module):
    """The first part gives one tensor to the second part, and another one to the third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Block(0), Block(1), Joins()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        skipped = h * 0.5
        return self.third(self.second(h), skipped)


def skipping(rank: int, world_size: int) -> tuple[list[tuple[str, str, str]], Tensor | None]:
    """Returns the report's rows, and the result of an evaluation on the last rank, of a pipeline that torch has traced and split."""
    x, target = batch(0)
    parts = {"second": SplitPoint.BEGINNING, "third": SplitPoint.BEGINNING}
    stage = pipeline(Skipping(), (x[: BATCH // CHUNKS],), split_spec=parts).build_stage(rank, torch.device("cpu"))
    stage.submod = torch.compile(stage.submod, backend=dct)  # type: ignore[assignment]
    schedule = ScheduleGPipe(stage, CHUNKS, loss_fn=loss_of)
    for _ in range(3):
        schedule.step(*[x] * stage.is_first, target=target)
    rows = [(site.name, site.kind, str(site.reason)) for site in sites() if site.training]
    with torch.no_grad():
        return rows, schedule.eval(*[x] * stage.is_first, target=target)


def test_what_skips_a_stage_is_encoded_too(ranks3: Ranks) -> None:
    results = ranks3(skipping)
    forward = {name for rows, _ in results for name, kind, reason in rows if (kind, reason) == ("activation", INT8)}
    backward = {name for rows, _ in results for name, kind, reason in rows if (kind, reason) == ("activation_gradient", INT8)}
    assert forward == backward == {"stage 0 to stage 1", "stage 1 to stage 2", "stage 0 to stage 2"}
    model = Skipping()
    for x, result in zip(batch(0)[0].chunk(CHUNKS), results[2][1].chunk(CHUNKS), strict=True):
        h = model.first(x).detach()
        expected = model.third(decoded(model.second(decoded(h)).detach()), decoded(h * 0.5))
        torch.testing.assert_close(result, expected)
