"""Tasks: the batches of ranks, what a seed decides, the schedule, the test numbers."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dct_compile.models.images import fashion_mnist, normalized
from dct_compile.models.optimization import Optimization
from dct_compile.models.parallel import Mesh
from dct_compile.models.recipes import RECIPES
from dct_compile.models.resnet import ResNet
from dct_compile.models.tasks import TASKS, DataSource, Task
from dct_compile.models.tasks.gpt import CONTEXT
from dct_compile.models.texts import split_text
from tests.small_images import write_images

ALONE = Mesh(1, 1, 0, 0, None, None)
TEXT = torch.randint(0, 256, (3000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setattr("dct_compile.models.tasks.gpt.shakespeare", lambda: TEXT)
    write_images(tmp_path, train=50, test=25)
    sources = {
        "dlrm": DataSource("synthetic", None, 200),
        "gpt": DataSource("shakespeare"),
        "resnet": DataSource("fashion-mnist", tmp_path),
    }
    return TASKS[request.param](sources[request.param], batch_size=8)


def test_the_rows_of_ranks_make_up_the_batch(task: Task) -> None:
    whole = list(task.batches(1, 3, ALONE))
    parts = [list(task.batches(1, 3, Mesh(2, 1, rank, 0, None, None))) for rank in range(2)]
    assert len(whole) == 3
    for step in range(3):
        for tensor, first, second in zip(whole[step], parts[0][step], parts[1][step], strict=True):
            assert torch.equal(tensor, torch.cat([first, second]))


def test_batches_are_those_of_the_seed(task: Task) -> None:
    first, again, other = (next(task.batches(seed, 1, ALONE)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_training_goes_on_after_an_epoch_with_another_order(task: Task) -> None:
    epoch = task.steps(1, 1)
    assert epoch > 1
    seen = list(task.batches(1, epoch + 1, ALONE))
    assert len(seen) == epoch + 1
    assert not torch.equal(seen[0][0], seen[epoch][0])


def test_parameters_and_buffers_are_reset_in_place(task: Task) -> None:
    model = task.build(ALONE)
    task.reset(model, ALONE, 1)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, schedule = task.recipe.optimization.start(model.parameters(), 4)
    state = torch.get_rng_state()
    for batch in task.batches(1, 2, ALONE):
        task.loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    assert not torch.equal(next(model.parameters()), before[next(iter(dict(model.named_parameters())))])
    task.reset(model, ALONE, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert torch.equal(torch.get_rng_state(), state), "random numbers of the user are left alone"


def test_the_first_steps_of_adagrad_do_not_throw_the_model_off() -> None:
    task = TASKS["dlrm"](DataSource("synthetic", None, 2000), batch_size=256)
    model = task.build(ALONE)
    task.reset(model, ALONE, 0)
    optimizer, schedule = task.recipe.optimization.start(model.parameters(), 6)
    losses = []
    for batch in task.batches(0, 6, ALONE):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert max(losses) < 0.8, "without a warm-up the second step has 1.7"


def test_the_default_rate_is_that_of_the_default_optimizer() -> None:
    for recipe in RECIPES.values():
        assert recipe.rates[recipe.optimization.optimizer] == recipe.optimization.lr


def test_a_batch_larger_than_the_data_is_an_error(task: Task) -> None:
    larger = type(task)(task.source, batch_size=1000)
    with pytest.raises(ValueError, match=f"a batch of 1000 is larger than the training part of {task.source.name}"):
        larger.check(1)


def test_gpt_loss_is_that_of_the_whole_test_part(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT.repeat(5)
    monkeypatch.setattr("dct_compile.models.tasks.gpt.shakespeare", lambda: text)
    task = TASKS["gpt"](DataSource("shakespeare"), 8)
    model = task.build(ALONE)
    part = split_text(text)[1].long()
    count = (len(part) - 1) // CONTEXT
    whole = model(part[: count * CONTEXT].view(count, CONTEXT), part[1 : count * CONTEXT + 1].view(count, CONTEXT)).item()
    found = task.test(model, model, 0, ALONE)
    assert found == pytest.approx({"loss": whole, "bits_per_byte": whole / math.log(2)}, rel=1e-5)


def test_too_short_a_text_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dct_compile.models.tasks.gpt.shakespeare", lambda: TEXT)
    with pytest.raises(ValueError, match="640 bytes are too few: a tenth of them, the test part, must hold more than 64"):
        TASKS["gpt"](DataSource("shakespeare", None, 10), 1).check(1)


def test_resnet_numbers_are_those_of_the_whole_test_part(tmp_path: Path) -> None:
    write_images(tmp_path, train=20, test=130)
    task = TASKS["resnet"](DataSource("fashion-mnist", tmp_path), 4)
    model = task.build(ALONE)
    task.reset(model, ALONE, 3)
    found = task.test(model, model, 0, ALONE)
    _, test = fashion_mnist(tmp_path)
    logits = model(normalized(test.pixels))
    right = (logits.argmax(1) == test.labels).float().mean().item()
    assert found == pytest.approx({"accuracy": right, "loss": cross_entropy(logits, test.labels).item()}, rel=1e-5)


def test_fewer_images(tmp_path: Path) -> None:
    write_images(tmp_path, train=50, test=25)
    task = TASKS["resnet"](DataSource("fashion-mnist", tmp_path, 24), 8)
    assert task.samples(0) == 24
    assert task.steps(0, 2) == 6


@pytest.mark.parametrize(("blocks", "layers"), [(1, 8), (2, 14)])
def test_resnet_layers_and_shapes(blocks: int, layers: int) -> None:
    model = ResNet(blocks)
    weights = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weights) == layers
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    images = torch.randn(2, 1, 28, 28)
    assert model.stages(torch.relu(model.stem_norm(model.stem(images)))).shape == (2, 64, 7, 7)


def test_resnet_learns_images_by_heart() -> None:
    torch.manual_seed(0)
    model = ResNet(width=4)
    images, labels = torch.randn(8, 1, 12, 12), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


def test_schedule() -> None:
    cosine = Optimization("sgd", 1.0, warmup=4, schedule="cosine")
    assert [round(cosine.factor(step, 8), 4) for step in (0, 3, 4, 7)] == [0.25, 0.6913, 0.5, 0.0381]
    assert {Optimization("adagrad", 1.0).factor(step, 8) for step in range(8)} == {1.0}
    with pytest.raises(ValueError, match="unknown schedule 'linear': there are constant, cosine"):
        Optimization("adagrad", 1.0, schedule="linear").factor(0, 8)


@pytest.mark.parametrize(
    ("optimization", "step"),
    [
        # Each first step from 1 with the gradient 2.
        (Optimization("sgd", 0.1), 0.2),
        (Optimization("adam", 0.1), 0.1),
        (Optimization("adamw", 0.1, weight_decay=0.5), 0.1 + 0.05),
        (Optimization("adagrad", 0.1), 0.1),
    ],
)
def test_optimizers(optimization: Optimization, step: float) -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer, schedule = optimization.start([parameter], 2)
    parameter.grad = torch.full((1,), 2.0)
    optimizer.step()
    schedule.step()
    assert 1 - parameter.item() == pytest.approx(step, rel=1e-5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_an_unknown_optimizer_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'lion': there are adagrad, adam, adamw, sgd"):
        replace(Optimization("sgd", 0.1), optimizer="lion").start([nn.Parameter(torch.ones(1))], 1)
