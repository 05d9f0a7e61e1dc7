"""``dct_compile.all_to_all_single``: values as by the reference codec, bytes on the sockets, asynchronous handles, the report."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dct_compile
from dct_compile.backend import dct
from dct_compile.bench.sockets import sent_bytes
from dct_compile.reasons import Note
from dct_compile.report import GRADIENTS_OUTSIDE
from tests.rank_pool import Ranks
from tests.ranks import fresh_compiler
from tests.ranks_embeddings import DENSE, DIM, ENCODED, Recommender, coded
from tests.tracing import fake_group


def input_of(rank: int, world_size: int, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """Returns the rows of a rank, and how many of them go to each rank: rank 1 sends none to rank 0."""
    sizes = [(rank + 2 * receiver + 1) * (rank != 1 or receiver != 0) for receiver in range(world_size)]
    return torch.randn(sum(sizes), DIM, generator=torch.Generator().manual_seed(rank)).to(dtype), sizes


def exchanged(rank: int, world_size: int, dtype: torch.dtype, bits: int, flat: bool, async_op: bool) -> tuple[Tensor, Tensor, bool]:
    """Returns the output, the reference's, and whether an asynchronous call has left the output alone until ``wait``."""
    x, sizes = input_of(rank, world_size, dtype)
    others = [input_of(other, world_size, dtype) for other in range(world_size)]
    expected = torch.cat([coded(y, DIM, bits).split(to)[rank] for y, to in others])
    incoming, unit = [to[rank] for _, to in others], DIM if flat else 1
    output = torch.full_like(expected, torch.nan)
    out, given = (output.view(-1), x.view(-1)) if flat else (output, x)
    splits = [size * unit for size in incoming], [size * unit for size in sizes]
    work = dct_compile.all_to_all_single(out, given, *splits, async_op=async_op, width=DIM if flat else None, bits=bits)
    untouched = bool(output.isnan().all())
    if work is not None:
        assert isinstance(work, dist.Work)
        assert work.wait()
        before = output.clone()
        work.wait()
        assert torch.equal(output, before)
        assert work.is_completed()
    return output, expected, untouched == async_op


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("dtype", "bits", "flat", "async_op"),
    [(torch.float32, 8, True, True), (torch.float32, 4, False, False), (torch.bfloat16, 8, False, True), (torch.float16, 8, True, False)],
)
def test_rows_arrive_as_by_the_reference(ranks3: Ranks, dtype: torch.dtype, bits: int, flat: bool, async_op: bool) -> None:
    for output, expected, in_time in ranks3(exchanged, dtype, bits, flat, async_op):
        assert torch.equal(output, expected)
        assert in_time


def exchanged_evenly(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Returns the output and the reference's, with a group of its own and without splits."""
    group = dist.new_group(list(range(world_size)))
    inputs = [torch.randn(4, 3, DIM, generator=torch.Generator().manual_seed(other)) for other in range(world_size)]
    output = torch.empty(4, 3, DIM)
    dct_compile.all_to_all_single(output, inputs[rank], group=group)
    return output, torch.cat([coded(x, DIM).chunk(world_size)[rank] for x in inputs])


@pytest.mark.distributed
def test_shares_are_equal_by_default(ranks2: Ranks) -> None:
    for output, expected in ranks2(exchanged_evenly):
        assert torch.equal(output, expected)


def gradients(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the table and the reference's: the gradients of vectors are encoded on their way back, too."""
    model, ids = Recommender(ENCODED, rank, world_size), torch.arange(8 * world_size) % 50
    model(ids).sum().backward()
    weights = model.top.weight.detach().view(world_size, DIM)
    # Of a sum, each vector's gradient is the weights of its table; a sender encodes those of all tables, table by table.
    sent = weights.repeat_interleave(8, dim=0)
    back = coded(sent, DIM).view(world_size, 8, DIM)[rank].repeat(world_size, 1)
    assert model.table.weight.grad is not None
    return model.table.weight.grad, torch.zeros(50, DIM).index_add_(0, ids, back)


@pytest.mark.distributed
def test_gradients_travel_encoded(ranks3: Ranks) -> None:
    for gradient, expected in ranks3(gradients):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


def bytes_per_step(rank: int, world_size: int, encoded: bool) -> tuple[int, tuple[str, ...]]:
    """Returns the bytes on this rank's sockets in one step, and the notes."""
    model = Recommender(ENCODED if encoded else DENSE, rank, world_size)
    compiled = torch.compile(model, backend=dct)
    ids = torch.arange(1024 * world_size) % 50
    compiled(ids).sum().backward()
    dist.barrier()
    start = sent_bytes()
    compiled(ids).sum().backward()
    return sent_bytes() - start, dct_compile.report().notes


@pytest.mark.distributed
def test_a_quarter_of_the_bytes(ranks2: Ranks) -> None:
    """The sockets agree with the report's note, and that names no graph break; where the bytes stay dense a note names the remedy."""
    for (dense, noted), (encoded, notes) in zip(ranks2(bytes_per_step, False), ranks2(bytes_per_step, True), strict=True):
        assert 3.5 < dense / encoded < 4
        payload = 2048 * (DIM + 2)  # of all rows of a rank; half of them stay there
        note = Note.ENCODED.format(name="dct_compile.all_to_all_single", count=4, before=4 * 2048 * DIM * 4, after=4 * payload)
        assert notes == (GRADIENTS_OUTSIDE, note)
        assert 0 <= encoded - 2 * payload // 2 < 1440
        assert any("async_op=True" in text and "dct_compile.all_to_all_single" in text for text in noted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": torch.ones(32)}, ["input is (32,)", "width=..."]),
        ({"input": torch.ones(4, 8, dtype=torch.int64)}, ["input is torch.int64"]),
        ({"output": torch.ones(4, 8, dtype=torch.float16)}, ["output is torch.float16 (4, 8)", "input is torch.float32 (4, 8)"]),
        ({"output": torch.ones(4, 4)}, ["output is torch.float32 (4, 4)"]),
        ({"output": torch.ones(8, 4).t()}, ["output has strides (1, 4)"]),
        ({"input": torch.ones(3, 8)}, ["input has a first size of 3", "2 ranks"]),
        ({"input_split_sizes": [1, 2]}, ["input_split_sizes is [1, 2]", "sum 4"]),
        ({"output_split_sizes": [4]}, ["output_split_sizes is [4]", "expected 2 sizes"]),
        ({"width": 3}, ["16 elements", "rows of 3"]),
        ({"width": 0}, ["width is 0"]),
        ({"bits": 2}, ["bits 2"]),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: list[str]) -> None:
    with fake_group(2), pytest.raises(ValueError, match=re.escape(words[0])) as raised:
        dct_compile.all_to_all_single(**{"output": torch.ones(4, 8), "input": torch.ones(4, 8), **changes})
    for word in words:
        assert word in str(raised.value)


def test_one_rank_encodes_nothing() -> None:
    with fake_group(1), fresh_compiler():
        dct_compile.all_to_all_single(torch.ones(4, 8), torch.ones(4, 8))
        assert not [note for note in dct_compile.report().notes if "encoded" in note]


def test_explain_counts_what_its_own_run_encodes() -> None:
    """A report of a training says nothing of it."""
    with fresh_compiler():
        explained = dct_compile.explain(Recommender(ENCODED, 0, 2), torch.arange(16), ranks=2)
        note = Note.ENCODED.format(name="dct_compile.all_to_all_single", count=1, before=16 * DIM * 4, after=16 * (DIM + 2))
        assert note in explained.notes
        assert not [text for text in dct_compile.report().notes if "encoded" in text]
