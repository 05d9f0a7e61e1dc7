"""Messages between pipeline stages travel as int8 rows from the third training step on, under every schedule of torch."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dct_compile.exchange import ACTIVATION, BACKWARD_OF
from dct_compile.reasons import Reason
from dct_compile.report import SiteReport
from tests.rank_pool import Ranks
from tests.ranks_pipeline import BATCH, CHUNKS, SCHEDULES, WIDTH, Block, Passed, Pipe, batch, decoded, sites

pytestmark = pytest.mark.distributed
DENSE_STEPS = 2
"""In the first one the stages are found, in the second one they look for each other."""


def trained(rank: int, world_size: int, name: str, dtype: torch.dtype) -> tuple[list[dict[int, Passed]], list[SiteReport]]:
    """Returns all that passed the ends of this rank's stages in four steps and an evaluation, and the report."""
    pipe = Pipe(name, lambda index: Block(index, dtype))
    passed = []
    for step in range(DENSE_STEPS + 2):
        pipe.step(*batch(step, dtype))
        passed.append(pipe.passed())
    if name != "v":  # torch cannot evaluate where stages pass tensors on within a rank
        pipe.evaluate(*batch(9, dtype))
        passed.append(pipe.passed())
    return passed, sites()


def sent_and_received(ranks: list[dict[int, Passed]]) -> list[tuple[int, list[tuple[Tensor, Tensor]]]]:
    """Returns, for each stage but the last one, the tensors of its edge to the next one: as they were sent, and as they arrived."""
    stages = {index: passed for rank in ranks for index, passed in rank.items()}
    pairs = []
    for first, last in pairwise(sorted(stages)):
        here, there = stages[first], stages[last]
        forward = list(zip(here.outputs, there.inputs, strict=True))
        pairs.append((first, forward + list(zip(there.input_grads, here.output_grads, strict=True))))
    return pairs


CASES = [(name, torch.bfloat16 if name == "gpipe" else torch.float32) for name in SCHEDULES]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_rows_arrive_as_their_codes_say(ranks2_once: Ranks, name: str, dtype: torch.dtype) -> None:
    for step, ranks in enumerate(zip(*(result[0] for result in ranks2_once(trained, name, dtype)), strict=True)):
        for first, pairs in sent_and_received(list(ranks)):
            assert len(pairs) == (2 * CHUNKS if step < DENSE_STEPS + 2 else CHUNKS)
            is_local = name == "v" and first == 1  # both stages are on rank 1
            for sent, arrived in pairs:
                expected = sent if step < DENSE_STEPS or is_local else decoded(sent)
                assert torch.equal(arrived, expected)
                assert torch.equal(arrived, sent) == (step < DENSE_STEPS or is_local)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_report_has_each_edge(ranks2_once: Ranks, name: str, dtype: torch.dtype) -> None:
    found = [site for _, report in ranks2_once(trained, name, dtype) for site in report if site.training]
    last = 2 * SCHEDULES[name][1] - 1
    edges = [(first, first + 1) for first in range(last) if (name, first) != ("v", 1)]
    kinds = (ACTIVATION, BACKWARD_OF[ACTIVATION])
    assert sorted((site.name, site.kind) for site in found) == sorted((f"stage {a} to stage {b}", kind) for a, b in edges for kind in kinds)
    rows = BATCH // CHUNKS
    for site in found:
        assert (site.decision, site.reason) == ("compressed", Reason.QUANTIZED.format(bits=8))
        assert (site.shape, site.calls) == ((rows, WIDTH), CHUNKS)
        assert (site.dense_bytes, site.wire_bytes) == (rows * WIDTH * dtype.itemsize, rows * (WIDTH + 2))
    evaluated = [site for _, report in ranks2_once(trained, name, dtype) for site in report if not site.training]
    assert sorted(site.name for site in evaluated) == [f"stage {a} to stage {b}" for a, b in edges if name != "v"]
