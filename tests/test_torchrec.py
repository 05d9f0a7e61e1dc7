"""Codecs for torchrec's sharded embeddings: values as by the reference, bytes on the sockets, notes. Needs torchrec for most."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dct_compile
from dct_compile.backend import dct
from dct_compile.bench.sockets import sent_bytes
from dct_compile.embeddings.codec import RowCodec
from dct_compile.embeddings.torchrec import Codec
from dct_compile.reasons import Note
from tests.rank_pool import Ranks
from tests.ranks_embeddings import coded


@pytest.fixture
def torchrec() -> None:
    """Skips the test where torchrec is not installed."""
    pytest.importorskip("torchrec", reason="torchrec is not installed: pip install 'dct-compile[recommenders]'")


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.float32), (4, torch.float32), (8, torch.float16)])
def test_a_codec_is_that_of_the_reference(bits: int, dtype: torch.dtype) -> None:
    codec, x = Codec(RowCodec(16, bits, "test", number=1)), torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    context = codec.create_context()
    with torch.no_grad():
        payload = codec.encode(x.view(-1), context)
        decoded = codec.decode(payload, context)
    assert payload.dtype == codec.quantized_dtype
    assert payload.numel() == codec.calc_quantized_size(x.numel(), context) == 15 * (2 + 16 * bits // 8)
    assert torch.equal(decoded, coded(x, 16, bits, number=1).view(-1))
    assert codec.padded_size(x, [48, 32], 0, context) == (48, 0)


def test_codes_have_no_gradient() -> None:
    codec = Codec(RowCodec(16, 8, "test"))
    with pytest.raises(RuntimeError, match="torchrec_use_sync_collectives"):
        codec.encode(torch.ones(16), codec.create_context())


def test_shares_that_cut_a_vector_are_named() -> None:
    with pytest.raises(ValueError, match="24 elements are no whole rows of 16"):
        Codec(RowCodec(16, 8, "test")).calc_quantized_size(24, Codec(RowCodec(16, 8, "test")).create_context())


def test_what_is_no_sharder_is_named() -> None:
    with pytest.raises(TypeError, match="Linear is no sharder"):
        dct_compile.torchrec_sharder(torch.nn.Linear(1, 1))


def one_step(rank: int, world_size: int, dims: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Returns pairs that must be equal: the pooled vectors of this rank's samples, and its tables after a step; each with the reference."""
    from tests.ranks_torchrec import BATCH, RATE, ids_of, parallel, weights_of

    features, dim = len(dims), dims[0]
    model = parallel(dims)
    found = model.module.embeddings(ids_of(rank, 0, features))
    ids = torch.stack([ids_of(other, 0, features).values().view(features, BATCH) for other in range(world_size)])
    owned = [[index for index in range(features) if index % world_size == owner] for owner in range(world_size)]
    sent = [torch.cat([weights_of(index, dim)[ids[:, index].reshape(-1)] for index in tables], dim=1) for tables in owned]
    received = [coded(x, dim).view(world_size, BATCH, -1)[rank] for x in sent]
    order = [f"f{index}" for tables in owned for index in tables]
    pairs = [(torch.cat([found[name] for name in order], dim=1), torch.cat(received, dim=1))]
    slopes = [torch.randn(BATCH, features * dim, generator=torch.Generator().manual_seed(90 + other)) for other in range(world_size)]
    (pairs[0][0] * slopes[rank]).sum().backward()
    widths = [len(tables) * dim for tables in owned]
    gradients = []
    for slope in slopes:
        returned = coded(torch.cat([part.reshape(-1) for part in slope.split(widths, dim=1)]), dim, number=1)
        gradients.append(returned.split([BATCH * width for width in widths])[rank].view(BATCH, len(owned[rank]), dim))
    stepped = {name: table for name, table in model.state_dict().items() if ".t_f" in name and table.local_shards()}
    for place, index in enumerate(owned[rank]):
        (table,) = [table.local_shards()[0].tensor for name, table in stepped.items() if f"t_f{index}." in name]
        steps = torch.cat([gradient[:, place] for gradient in gradients]) * (RATE / world_size)
        pairs.append((table.detach(), weights_of(index, dim).index_add_(0, ids[:, index].reshape(-1), -steps)))
    return [(actual.detach(), expected) for actual, expected in pairs]


@pytest.mark.distributed
@pytest.mark.usefixtures("torchrec")
@pytest.mark.parametrize("ranks", ["ranks2", "ranks3"])
def test_vectors_and_gradients_arrive_as_by_the_reference(ranks: str, request: pytest.FixtureRequest) -> None:
    """With three tables two ranks have shares of different sizes."""
    for pairs in request.getfixturevalue(ranks)(one_step, (16, 16, 16)):
        assert len(pairs) >= 2
        for actual, expected in pairs:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def vectors(rank: int, world_size: int, dims: tuple[int, ...], sharding: str, pooled: bool, encoded: bool, bits: int) -> Tensor:
    from tests.ranks_torchrec import ids_of, parallel

    with torch.no_grad():
        found = parallel(dims, sharding, pooled, encoded, bits).module.embeddings(ids_of(rank, 0, len(dims)))
        return found.values() if pooled else torch.cat([part.values() for part in found.values()], dim=1)


@pytest.mark.distributed
@pytest.mark.usefixtures("torchrec")
@pytest.mark.parametrize(
    ("dims", "sharding", "pooled", "bits"),
    [((16, 64), "table", True, 8), ((32, 32), "column", True, 8), ((16, 16), "table", False, 8), ((32, 32), "table", True, 4)],
)
def test_every_exchange_is_encoded(ranks2: Ranks, dims: tuple[int, ...], sharding: str, pooled: bool, bits: int) -> None:
    """No vector is further from the dense one than one step of its scale, and few are equal to it."""
    encoded, dense = (ranks2(vectors, dims, sharding, pooled, on, bits) for on in (True, False))
    for actual, expected in zip(encoded, dense, strict=True):
        step = expected.abs().max() / (127 if bits == 8 else 7) * 1.01
        assert (actual - expected).abs().max() <= step
        assert (actual != expected).float().mean() > 0.9


def step_bytes(rank: int, world_size: int, encoded: bool, sharding: str) -> tuple[int, list[str]]:
    """Returns the bytes of a step of the embeddings alone on this rank's sockets, and the notes that are about torchrec."""
    from tests.ranks_torchrec import ids_of, parallel

    embeddings = parallel((128, 128), sharding, encoded=encoded).module.embeddings
    for step in range(2):
        dist.barrier()
        start = sent_bytes()
        embeddings(ids_of(rank, step, 2)).values().sum().backward()
    return sent_bytes() - start, [note for note in dct_compile.report().notes if "torchrec" in note]


@pytest.mark.distributed
@pytest.mark.usefixtures("torchrec")
@pytest.mark.parametrize(("sharding", "less", "share"), [("table", 3.5, 0.5), ("row", 5, 1)])
def test_a_quarter_of_the_bytes(ranks2: Ranks, sharding: str, less: float, share: float) -> None:
    """The integers of the exchanged ids are part of both. The dense module's note names the remedy.

    gloo sums a dense reduce_scatter by an all_reduce, which sends twice as much. Encoded sums leave out what a rank adds up itself; of what
    an all_to_all encodes, half stays on its rank.
    """
    size, ids = 4 * 2 * 64 * 128, 3000
    after = 4 * size // 512 * 130
    note = Note.ENCODED.format(name="dct_compile.torchrec_sharder", count=4, before=4 * size, after=after)
    for (dense, told), (encoded, counted) in zip(*(ranks2(step_bytes, on, sharding) for on in (False, True)), strict=True):
        assert less < dense / encoded < less + 1
        assert 0 < encoded - share * after / 2 < ids
        assert counted == [note]
        assert told == [Note.TORCHREC.format(modules="ShardedEmbeddingBagCollection")]


def trained(rank: int, world_size: int, sharding: str) -> tuple[list[tuple[str, str, float | None]], tuple[str, ...]]:
    """Trains a compiled model; returns kind, decision and ratio of the collectives, and the notes."""
    from tests.ranks_torchrec import ids_of, parallel

    model = parallel((32, 32), sharding)
    compiled: Any = torch.compile(model, backend=dct)
    for step in range(3):
        compiled(ids_of(rank, step, 2)).square().mean().backward()
    sites = [(site.kind, site.decision, site.ratio) for site in dct_compile.report().sites]
    return sites, dct_compile.report().notes


@pytest.mark.distributed
@pytest.mark.usefixtures("torchrec")
@pytest.mark.parametrize("sharding", ["table", "row"])
def test_a_compiled_model_has_clean_graphs(ranks2: Ranks, sharding: str) -> None:
    """Dynamo leaves the sharded module alone, and the gradients of the MLP are compressed as those of any DDP module."""
    for sites, notes in ranks2(trained, sharding):
        assert [(kind, decision) for kind, decision, _ in sites] == [("gradient", "compressed")]
        assert (sites[0][2] or 0) > 50
        assert not [note for note in notes if "a graph ends early" in note or "exchanges the embeddings" in note]
        assert any(note.startswith("dct_compile.torchrec_sharder has encoded 6 tensors") for note in notes)


def in_turn(rank: int, world_size: int) -> str:
    from torchrec.distributed import comm_ops

    from tests.ranks_torchrec import ids_of, parallel

    embeddings = parallel((16, 16)).module.embeddings
    comm_ops.set_use_sync_collectives(True)
    try:
        embeddings(ids_of(rank, 0, 2)).values()
    except RuntimeError as error:
        return str(error)
    finally:
        comm_ops.set_use_sync_collectives(False)
    return ""


@pytest.mark.distributed
@pytest.mark.usefixtures("torchrec")
def test_a_gradient_that_codes_would_lose_is_an_error(ranks2: Ranks) -> None:
    assert all("their gradient would be lost" in text for text in ranks2(in_turn))
