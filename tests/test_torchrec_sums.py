"""Pooled embeddings that are added up over ranks: near dense under torchrec, bytes, notes."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dct_compile
from dct_compile.reasons import Note
from tests.rank_pool import Ranks
from tests.ranks_embeddings import normal

pytestmark = pytest.mark.distributed
NAME = "dct_compile.torchrec_sharder"


@pytest.fixture
def torchrec() -> None:
    """Skips the test where torchrec is not installed."""
    pytest.importorskip("torchrec", reason="torchrec is not installed: pip install 'dct-compile[recommenders]'")


class Step(NamedTuple):
    """Of one step of a rank: pairs of values and dense ones, the largest error that is allowed for each pair, notes, bytes encoded."""

    pairs: list[tuple[Tensor, Tensor]]
    bounds: list[float]
    notes: list[str]


def one_step(rank: int, ranks: int, dims: tuple[int, ...], sharding: str, bits: int, batches: list[int], per_host: int | None) -> Step:
    """Looks up one id of each feature of each sample, and makes a step: dense values follow from ids and tables alone."""
    from tests.ranks_torchrec import RATE, hosts_of, ids_of, parallel, weights_of

    features, largest = len(dims), 127 if bits == 8 else 7
    ids = [ids_of(other, 0, features, batches[other]) for other in range(ranks)]
    slopes = [normal(90 + other, batches[other], sum(dims)) for other in range(ranks)]
    with hosts_of(per_host):
        model = parallel(dims, sharding, bits=bits)
        found = model.module.embeddings(ids[rank])
        vectors = torch.cat([found[f"f{index}"] for index in range(features)], dim=1)
        (vectors * slopes[rank]).sum().backward()
        notes = [note for note in dct_compile.report().notes if "torchrec" in note]
    weights = [weights_of(index, dim) for index, dim in enumerate(dims)]
    looked_up = torch.cat([weight[ids[rank][f"f{index}"].values()] for index, weight in enumerate(weights)], dim=1)
    pairs, bounds = [(vectors.detach(), looked_up)], [looked_up.abs().max().item() / largest]
    for index, weight in enumerate(weights):
        steps = torch.zeros_like(weight)
        counts = torch.zeros(len(weight))
        for of_rank, slope in zip(ids, slopes, strict=True):
            places = of_rank[f"f{index}"].values()
            steps.index_add_(0, places, slope.split(dims, dim=1)[index] * (RATE / ranks))
            counts.index_add_(0, places, torch.ones(len(places)))
        (table,) = [tensor for name, tensor in model.state_dict().items() if f"t_f{index}." in name]
        for shard in table.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            pairs.append((shard.tensor.detach().clone(), (weight - steps)[row : row + rows, column : column + columns]))
            bounds.append(counts.max().item() * max(slope.abs().max().item() for slope in slopes) * RATE / ranks / largest)
    return Step(pairs, bounds, notes)


def encoded(count: int, before: int, width: int, bits: int = 8) -> list[str]:
    """Returns the notes where all exchanges are encoded."""
    return [Note.ENCODED.format(name=NAME, count=count, before=before, after=before // 4 // width * (2 + width * bits // 8))]


@pytest.mark.usefixtures("torchrec")
@pytest.mark.parametrize(
    ("dims", "sharding", "bits", "batches", "per_host", "numbers"),
    [
        # a rank sends its partial sums to the others, and the gradient of its own samples
        ((32, 32), "row", 8, [64, 64], None, 64 * 64 + 64 * 64),
        ((16, 32), "row", 4, [64, 64], None, 64 * 48 + 64 * 48),
        ((32, 32), "row", 8, [64, 64, 64], None, 2 * 64 * 64 + 64 * 64),
        ((32, 32), "row", 8, [64, 20, 33], None, -1),
        # and for the other table the vectors of all samples, and the gradient of all vectors
        ((32, 32), "mixed", 8, [64, 64], None, -1),
        # as row-wise, where each rank may be a host; the all_to_all after it has one rank
        ((32, 32), "table_row", 8, [64, 64], None, 64 * 64 + 64 * 64),
        # two hosts: each rank has the sum of its host for two ranks, one of them on the other host
        ((32, 32), "row", 8, [64, 64, 64, 64], 2, 64 * 64 + 64 * 64),
        # the vectors of its host's table for two ranks, and the gradient of all vectors
        ((32, 32), "table_row", 8, [64, 64, 64, 64], 2, 128 * 32 + 64 * 64),
        ((256, 256), "grid", 8, [64, 64, 64, 64], 2, 128 * 256 + 64 * 512),
    ],
)
def test_vectors_and_tables_are_near_dense(
    request: pytest.FixtureRequest, dims: tuple[int, ...], sharding: str, bits: int, batches: list[int], per_host: int | None, numbers: int
) -> None:
    steps = request.getfixturevalue(f"ranks{len(batches)}")(one_step, dims, sharding, bits, batches, per_host)
    for step in steps:
        for (actual, expected), bound in zip(step.pairs, step.bounds, strict=True):
            assert (actual - expected).abs().max() <= 1.01 * bound
            assert not actual.equal(expected)
        if numbers >= 0:
            assert step.notes == encoded(2, 4 * numbers, 128 if sharding == "grid" else min(dims), bits)
        else:
            assert len(step.notes) == 1, step.notes
            assert step.notes[0].startswith(f"{NAME} has encoded")


def sums_of_features(rank: int, ranks: int, distinct: list[list[int]], per_host: int | None) -> list[tuple[Tensor, Tensor]]:
    """Returns the vectors, and the tables after a step, where each feature has a batch of its own; each with the dense values.

    ``distinct``: for each rank the samples of both features that are looked up; all samples are copies of these.
    """
    from torchrec import KeyedJaggedTensor

    from tests.ranks_torchrec import RATE, ROWS, hosts_of, parallel, weights_of

    samples = 8
    ids = [torch.randint(ROWS, (sum(counts),), generator=torch.Generator().manual_seed(other)) for other, counts in enumerate(distinct)]
    inverse = torch.stack([torch.arange(samples) % count for count in distinct[rank]])
    names = ["f0", "f1"]
    strides = [[count] for count in distinct[rank]]
    jagged = KeyedJaggedTensor(
        names, ids[rank], lengths=torch.ones_like(ids[rank]), stride_per_key_per_rank=strides, inverse_indices=(names, inverse)
    )
    with hosts_of(per_host):
        model = parallel((16, 32), "row")
        found = model.module.embeddings(jagged)
        vectors = torch.cat([found[name] for name in names], dim=1)
        vectors.sum().backward()
    parts = ids[rank].split(distinct[rank])
    expected = torch.cat([weights_of(index, 16 * (1 + index))[parts[index][inverse[index]]] for index in range(2)], dim=1)
    pairs = [(vectors.detach(), expected)]
    for index in range(2):
        weight = weights_of(index, 16 * (1 + index))
        for counts, of_rank in zip(distinct, ids, strict=True):
            uses = torch.bincount(torch.arange(samples) % counts[index], minlength=counts[index]).float()
            weight.index_add_(0, of_rank.split(counts)[index], -RATE / ranks * uses.unsqueeze(1).expand(-1, weight.shape[1]))
        (table,) = [tensor for name, tensor in model.state_dict().items() if f"t_f{index}." in name]
        (shard,) = table.local_shards()
        row, rows = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
        pairs.append((shard.tensor.detach().clone(), weight[row : row + rows]))
    return pairs


@pytest.mark.usefixtures("torchrec")
@pytest.mark.parametrize(
    ("distinct", "per_host"),
    # inside of hosts torchrec's own all_gather carries the gradient, and gloo's takes equal sizes only
    [([[5, 3], [2, 7]], None), ([[5, 3], [2, 7], [4, 1]], None), ([[5, 3], [5, 3], [5, 3], [5, 3]], 2)],
)
def test_each_feature_may_have_a_batch_of_its_own(distinct: list[list[int]], per_host: int | None, request: pytest.FixtureRequest) -> None:
    for pairs in request.getfixturevalue(f"ranks{len(distinct)}")(sums_of_features, distinct, per_host):
        for actual, expected in pairs:
            assert (actual - expected).abs().max() <= 1.01 * expected.abs().max() / 127


def losses(rank: int, ranks: int, encoded: bool) -> tuple[list[float], Tensor]:
    """Trains on ids with a hidden score; returns the losses, and what all ranks must have alike."""
    from tests.ranks_torchrec import ROWS, ids_of, parallel

    model = parallel((32, 32), "mixed", encoded=encoded)
    score = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.SGD(model.module.top.parameters(), lr=0.05)
    found = []
    for step in range(150):
        ids = ids_of(rank, step, 2)
        truth = sum(score[index][ids[f"f{index}"].values()] for index in range(2))
        loss = (model(ids) - truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, torch.cat([parameter.detach().flatten() for parameter in model.module.top.parameters()])


@pytest.mark.usefixtures("torchrec")
def test_a_training_learns_as_dense(ranks2: Ranks) -> None:
    dense, encoded = (ranks2(losses, on) for on in (False, True))
    assert encoded[0][1].equal(encoded[1][1])
    for (before, _), (after, _) in zip(dense, encoded, strict=True):
        assert min(before[-10:]) < before[0] / 2
        torch.testing.assert_close(after, before, rtol=0.1, atol=0.02)


def after_a_step(rank: int, ranks: int, way: str) -> tuple[list[Tensor], list[str]]:
    """Returns vectors and tables after two steps, and the notes about torchrec. ``way``: what is special about the module."""
    from torchrec.distributed import comm_ops
    from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
    from torchrec.distributed.types import ShardingEnv

    from tests.ranks_torchrec import ids_of, parallel

    config = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.FP16)
    codecs = get_qcomm_codecs_registry(config, device=torch.device("cpu")) if way == "own codec" else None
    model = parallel((32, 32), "row", encoded=way != "dense", codecs=codecs)
    embeddings = model.module.embeddings
    comm_ops.set_use_sync_collectives(way == "in turn")
    try:
        for step in range(2):
            if way == "moved" and step == 1:
                assert dist.group.WORLD is not None
                embeddings.update_shards({}, ShardingEnv.from_process_group(dist.group.WORLD), torch.device("cpu"))
            vectors = embeddings(ids_of(rank, step, 2)).values()
            vectors.square().sum().backward()
    finally:
        comm_ops.set_use_sync_collectives(False)
    tables = [table.local_shards()[0].tensor.detach().clone() for name, table in model.state_dict().items() if ".t_f" in name]
    return [vectors.detach(), *tables], [note for note in dct_compile.report().notes if "torchrec" in note]


@pytest.mark.usefixtures("torchrec")
@pytest.mark.parametrize("way", ["in turn", "moved"])
def test_sums_stay_encoded(ranks2: Ranks, way: str) -> None:
    """Under torchrec's synchronous collectives, and where its tables have moved."""
    for (plain, _), (special, notes) in zip(*(ranks2(after_a_step, name) for name in ("plain", way)), strict=True):
        assert notes == encoded(4, 4 * 4 * 64 * 64, 32)
        for actual, expected in zip(special, plain, strict=True):
            assert actual.equal(expected)


@pytest.mark.usefixtures("torchrec")
def test_a_codec_of_the_users_for_sums_stays_and_is_told(ranks2: Ranks) -> None:
    for (dense, told), (given, notes) in zip(*(ranks2(after_a_step, name) for name in ("dense", "own codec")), strict=True):
        assert told == [Note.TORCHREC.format(modules="ShardedEmbeddingBagCollection")]
        assert notes == [Note.TORCHREC_SUMS.format(tables="t_f0, t_f1")]
        for actual, expected in zip(given, dense, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
