"""Option ``exempt`` leaves out one exchange: by its module, its short name, its source line, or all of its name."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dct_compile.config import DCTConfig
from dct_compile.passes.plan import plan
from tests.hand_made_sites import make_gradient, make_site
from tests.small_models import __file__ as models_file
from tests.small_models import exchange, leaf
from tests.tracing import Trace, trace

LINE = next(
    number for number, text in enumerate(Path(models_file).read_text().splitlines(), 1) if "funcol.all_to_all_single_autograd" in text
)
KEPT = "row threshold, 4 of 64 kept"


class Mixer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return exchange(x.relu()).sin()


class Net(nn.Module):
    """Two exchanges, issued by ``first.0`` and ``second`` in the same line."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(Mixer()), Mixer()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


def reasons(pattern: str) -> list[str]:
    traced: Trace = trace(Net(), leaf(16, 64), exempt=[pattern])
    return traced.reasons


@pytest.mark.parametrize("pattern", ["second", "sec*", f"second: small_models.py:{LINE}", f"second: *:{LINE}"])
def test_one_of_two_by_module_or_short_name(pattern: str) -> None:
    exempt = f"exempt by pattern {pattern!r}"
    assert reasons(pattern) == [KEPT, exempt, f"its forward is dense: {exempt}", "the forward's mask, values only"]


@pytest.mark.parametrize(
    "pattern", [f"small_models.py:{LINE}", "small_models.py:*", f"tests/small_models.py:{LINE}", f"{models_file}:{LINE}", "*"]
)
def test_all_of_a_line(pattern: str) -> None:
    assert reasons(pattern)[:2] == [f"exempt by pattern {pattern!r}"] * 2


@pytest.mark.parametrize("pattern", ["first", "third.*", f"models.py:{LINE}", f"small_models.py:{LINE + 1}", "*.bias", "exchange"])
def test_pattern_of_something_else(pattern: str) -> None:
    assert reasons(pattern)[:2] == [KEPT] * 2


def test_all_of_the_name_is_no_pattern() -> None:
    traced = trace(Net(), leaf(16, 64))
    name = traced.decisions[0].exchange.name
    assert name.startswith(f"first.0: small_models.py:{LINE} in exchange: exchanged")
    assert reasons(name)[:2] == [f"exempt by pattern {name!r}", KEPT]
    site = make_site()
    site.name = "model.py:3 in forward: y = exchange(parts[0])"
    assert plan([site], DCTConfig(exempt=(site.name,)), True)[0].scheme == "dense"


def test_embedding_is_exempt_too() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mixer = nn.Embedding(8, 64), Mixer()

        def forward(self, rows: Tensor) -> Tensor:
            return exchange(self.table(rows)).sin()

    rows = torch.randint(0, 8, (16,))
    assert trace(Table(), rows).schemes == ["quantized_rows"] * 2
    pattern = f"small_models.py:{LINE}"
    assert trace(Table(), rows, exempt=[pattern]).reasons[0] == f"exempt by pattern {pattern!r}"


def test_what_ranks_compare_says_dense() -> None:
    """The ranks compare decisions: a pattern that only one of them has is an error that names the option."""
    forward, gradient = make_site(), make_gradient(4096)
    exempt = plan([forward, gradient], DCTConfig(exempt=("here",)), True)
    assert exempt[0].digest == "dense"
    assert exempt[1].compressed
    assert DCTConfig(exempt=("here",)).comparable()["exempt"] == ["here"]
