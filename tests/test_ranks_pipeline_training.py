"""Pipelines with encoded messages: their bytes are those of the report, and they learn as dense ones do."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dct_compile
from dct_compile.bench.sockets import sent_bytes
from tests.rank_pool import Ranks
from tests.ranks_pipeline import CHUNKS, Pipe

pytestmark = pytest.mark.distributed
STEPS, FRAMING = 4, 144 * 2 * CHUNKS
"""Bytes per step and peer that gloo's headers may take: 144 per message, and a stage sends at most two for each microbatch."""
WIDTH = 512
VOCABULARY, LENGTH, HIDDEN = 32, 16, 32


class Wide(nn.Module):
    """A linear layer with long rows."""

    def __init__(self, index: int) -> None:
        super().__init__()
        torch.manual_seed(index)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


def counted(rank: int, world_size: int) -> tuple[float, int]:
    """Returns the bytes per step by the sockets and by the report."""
    pipe, start = Pipe(make=Wide), 0
    x = torch.randn(32, WIDTH)
    for step in range(3 + STEPS):
        if step == 3:  # connections are made, and the stages have agreed
            dist.barrier()
            start = sent_bytes()
        pipe.step(x, x)
    return (sent_bytes() - start) / STEPS, dct_compile.report().wire_bytes


def check(results: list[tuple[float, int]]) -> None:
    rows, size = len(results), 32 * (WIDTH + 2)
    neighbours = [1, *[2] * (rows - 2), 1]
    for (measured, reported), peers in zip(results, neighbours, strict=True):
        assert reported == peers * size
        assert reported <= measured <= 1.01 * reported + peers * FRAMING


def test_two_stages_send_what_the_report_says(ranks2: Ranks) -> None:
    check(ranks2(counted))


def test_three_stages_send_what_the_report_says(ranks3: Ranks) -> None:
    check(ranks3(counted))


class Part(nn.Module):
    """One half of a small transformer: tokens to hidden states, or hidden states to logits."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN) if index == 0 else None
        self.places = nn.Parameter(torch.zeros(LENGTH, HIDDEN)) if index == 0 else None
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN) for _ in range(2)])
        self.attention = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.layers = nn.Sequential(nn.Linear(HIDDEN, 64), nn.GELU(), nn.Linear(64, HIDDEN))
        self.head = nn.Linear(HIDDEN, VOCABULARY) if index else None

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.embedding is None else self.embedding(x) + self.places
        query, key, value = self.attention(self.norms[0](h)).chunk(3, -1)
        h = h + nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        h = h + self.layers(self.norms[1](h))
        return h if self.head is None else self.head(h)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def texts(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns tokens and their successors: a token is one more than the one before it, in two of three places."""
    tokens = torch.randint(VOCABULARY, (16, LENGTH + 1), generator=generator)
    for place in range(2, LENGTH + 1):
        follows = torch.rand(16, generator=generator) < 2 / 3
        tokens[:, place] = torch.where(follows, (tokens[:, place - 1] + 1) % VOCABULARY, tokens[:, place])
    return tokens[:, :-1], tokens[:, 1:]


def learned(rank: int, world_size: int) -> dict[str, list[float]]:
    """Returns the loss at the end of trainings with three seeds, with encoded and with dense messages."""
    losses: dict[str, list[float]] = {}
    for name, exempt in (("dct", []), ("dense", ["stage *"])):
        pipe = Pipe("gpipe", Part, options={"exempt": exempt}, loss=cross_entropy)
        module = pipe.modules[rank]
        for seed in range(3):
            torch.manual_seed(seed)
            for part in module.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
            generator = torch.Generator().manual_seed(seed)
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
            last = []
            for _ in range(50):
                last.append(pipe.step(*texts(generator)))
                optimizer.step()
                optimizer.zero_grad()
            losses.setdefault(name, []).append(sum(last[-10:]) / 10)
        assert {site.decision for site in dct_compile.report().sites} == ({"compressed"} if name == "dct" else {"dense"}), name
        dct_compile.reset_report()
    return losses


def test_a_transformer_learns_as_with_dense_messages(ranks2: Ranks) -> None:
    losses = ranks2(learned)[1]
    dense, encoded = torch.tensor(losses["dense"]), torch.tensor(losses["dct"])
    assert dense.max() < 2.6  # it has learned something: uniform guesses have 3.47
    assert (encoded - dense).abs().mean() <= dense.max() - dense.min(), losses
