"""DLRM on a mesh equals DLRM in one process; metrics equal their definitions."""

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from dct_compile.models.dlrm import DLRM
from dct_compile.models.gpt import GPT
from dct_compile.models.metrics import auc, log_loss
from dct_compile.models.parallel import (
    ColumnParallelLinear,
    ShardedEmbeddings,
    Table,
    average_sharded_gradients,
    balance,
    make_mesh,
    sharded_parameters,
    wrap_data_parallel,
)
from tests.rank_pool import RankPool
from tests.tracing import fake_group

TABLES = (Table("a", 40), Table("b", 7), Table("c", 9, width=3), Table("d", 5))
BATCH = 16
WIDTHS = {"bottom": (24, 12, 8, 4), "top": (16, 12, 6, 1)}


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randint(0, rows, (BATCH,), generator=generator) for rows in (40, 7, 9, 9, 9, 5)], dim=1)
    ids[:, 2].clamp_(min=1)
    return torch.randn(BATCH, 3, generator=generator), ids, torch.randint(0, 2, (BATCH,), generator=generator).float()


def _expected() -> dict[str, torch.Tensor]:
    model = DLRM(3, TABLES, **WIDTHS)
    dense, ids, labels = _batch()
    binary_cross_entropy_with_logits(model(dense, ids), labels).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _compare_on_mesh(rank: int, world_size: int, dp: int, mp: int) -> int:
    mesh = make_mesh(dp, mp)
    model = DLRM(3, TABLES, mesh.mp_group, **WIDTHS)
    wrapped = wrap_data_parallel(model, mesh)
    rows = slice(mesh.dp_rank * BATCH // dp, (mesh.dp_rank + 1) * BATCH // dp)
    dense, ids, labels = (part[rows] for part in _batch())
    logits = wrapped(dense, ids)
    assert logits.shape == (BATCH // dp,)
    binary_cross_entropy_with_logits(logits, labels).backward()
    average_sharded_gradients(model, mp)
    sharded = dict(sharded_parameters(model))
    expected = _expected()
    for name, parameter in model.named_parameters():
        gradient = expected[name]
        if name in sharded and not name.startswith("embeddings."):
            gradient = gradient.chunk(mp)[mesh.mp_rank]
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    return len(expected)


@pytest.mark.distributed
@pytest.mark.parametrize(("dp", "mp"), [(2, 2), (1, 2), (2, 1)])
def test_gradients_on_a_mesh_equal_those_of_one_process(rank_pool: RankPool, dp: int, mp: int) -> None:
    assert rank_pool.run(dp * mp, _compare_on_mesh, dp, mp) == [20] * (dp * mp)


def test_every_table_and_wide_layer_is_sharded() -> None:
    model = DLRM(3, TABLES, **WIDTHS)
    names = {name for name, _ in sharded_parameters(model)}
    assert names == {
        *(f"embeddings.weights.{table.name}" for table in TABLES),
        *(f"{layer}.{part}" for layer in ("bottom_wide", "top_wide") for part in ("weight", "bias")),
    }


def test_paper_widths_are_the_default() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in DLRM(13, TABLES).named_parameters()}
    assert shapes["bottom_first.weight"] == (512, 13)
    assert shapes["bottom_wide.weight"] == (256, 512)
    assert shapes["bottom_last.2.weight"] == (16, 64)
    assert shapes["top_first.weight"] == (512, 16 + 10)
    assert shapes["top_last.2.weight"] == (1, 128)


def test_interaction_takes_each_pair_once() -> None:
    model = DLRM(3, TABLES, **WIDTHS)
    seen: list[torch.Tensor] = []
    model.top_first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dense, ids, _ = _batch()
    model(dense, ids)
    bottom = model.bottom_last(model.bottom_wide(torch.relu(model.bottom_first(dense))))
    vectors = [bottom, *model.embeddings(ids).unbind(1)]
    products = [(vectors[i] * vectors[j]).sum(1) for i in range(5) for j in range(i + 1, 5)]
    torch.testing.assert_close(seen[0], torch.cat([bottom, torch.stack(products, 1)], 1))


def test_several_ids_are_averaged_without_padding() -> None:
    embeddings = ShardedEmbeddings((Table("bag", 6, width=3),), 2, None)
    weight = torch.arange(12.0).view(6, 2)
    with torch.no_grad():
        embeddings.weights["bag"].copy_(weight)
    pooled = embeddings(torch.tensor([[2, 4, 0], [5, 0, 0]]))
    torch.testing.assert_close(pooled[:, 0], torch.stack([weight[[2, 4]].mean(0), weight[5]]))


def test_reset_parameters_is_repeatable_and_in_place() -> None:
    model = DLRM(3, TABLES, **WIDTHS, seed=1)
    before = {name: (parameter.data_ptr(), parameter.detach().clone()) for name, parameter in model.named_parameters()}
    model.reset_parameters(2)
    assert all(not torch.equal(parameter, before[name][1]) for name, parameter in model.named_parameters())
    model.reset_parameters(1)
    assert all(torch.equal(parameter, before[name][1]) for name, parameter in model.named_parameters())
    assert all(parameter.data_ptr() == before[name][0] for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([5, 5], [[0], [1]]), ([1, 10, 4, 4], [[1], [0, 2, 3]]), ([3, 3, 3], [[0, 2], [1]])],
)
def test_balance(rows: list[int], expected: list[list[int]]) -> None:
    assert balance([Table(str(i), count) for i, count in enumerate(rows)], 2) == expected


def test_sizes_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match="three layers"):
        DLRM(3, TABLES, bottom=(8, 4))
    with pytest.raises(ValueError, match="one output"):
        DLRM(3, TABLES, top=(8, 4, 2))


def test_uneven_shares_are_errors() -> None:
    with fake_group(3) as group:
        with pytest.raises(ValueError, match="4 columns cannot be shared equally by 3 ranks"):
            ColumnParallelLinear(2, 4, group)
        with pytest.raises(ValueError, match="2 tables cannot be shared by 3 ranks"):
            ShardedEmbeddings(TABLES[:2], 4, group)
        with pytest.raises(RuntimeError, match="mesh of 2 x 2 needs 4 ranks, there are 3"):
            make_mesh(2, 2)


@pytest.mark.parametrize("levels", [3, 1000])
def test_auc_equals_its_definition(levels: int) -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, levels, 300).astype(np.float32)
    labels = (generator.random(300) < 0.3).astype(np.float32)
    difference = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    assert auc(scores, labels) == pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean(), abs=1e-12)


def test_auc_of_one_class_is_nan() -> None:
    assert np.isnan(auc(np.zeros(3), np.ones(3)))


def test_log_loss_equals_its_definition() -> None:
    logits, labels = np.array([-3.0, 0.0, 2.0]), np.array([0.0, 1.0, 0.0])
    probability = 1 / (1 + np.exp(-logits))
    expected = -np.mean(labels * np.log(probability) + (1 - labels) * np.log(1 - probability))
    assert log_loss(logits, labels) == pytest.approx(expected)
    assert log_loss(np.array([1000.0]), np.array([0.0])) == 1000.0


def test_gpt_looks_at_no_byte_that_follows() -> None:
    torch.manual_seed(0)
    net = GPT(width=16, blocks=2, context=8, heads=2)
    text = torch.randint(0, 256, (3, 8))
    per_place = []
    for last in (text[:, 7], (text[:, 7] + 1) % 256):
        changed = torch.cat([text[:, :7], last[:, None]], dim=1)
        per_place.append([net(changed[:, : length + 1], text[:, : length + 1]).item() for length in range(8)])
    assert per_place[0][:7] == per_place[1][:7]
    assert per_place[0][7] != per_place[1][7]


def test_gpt_learns_a_text_by_heart() -> None:
    torch.manual_seed(0)
    net = GPT(width=32, blocks=1, context=16)
    text = torch.randint(0, 256, (2, 17))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = net(text[:, :-1], text[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
