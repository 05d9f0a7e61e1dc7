"""Numbers that ``dct train`` shows while it trains, and between two readings."""

import pytest
import torch

from dct_compile.cli.results import Run, gradient_density
from dct_compile.cli.worker import _postfix
from dct_compile.report import SiteReport
from tests.test_cli_train import SITE


def test_density_between_two_readings() -> None:
    run = Run(0, {}, 30, [1.0], [0.0], [(10, 0.05), (20, 0.03), (30, 0.02)], 1)
    assert [(step, round(density, 9)) for step, density in run.density_between()] == [(10, 0.05), (20, 0.01), (30, 0.0)]


def test_progress_shows_what_is_known() -> None:
    assert _postfix(torch.tensor(0.5), {}) == {"loss": "0.5000"}
    numbers = {"density": 0.01012, "overflow": 1200, "compression": 37.24}
    shown = {"loss": "0.5000", "density": "0.0101", "overflow": "1200", "compression": "37.2x"}
    assert _postfix(torch.tensor(0.5), numbers) == shown


def test_gradient_density_is_weighted_by_size() -> None:
    larger = SiteReport(**{**vars(SITE), "shape": (3000,), "density": 0.05})
    others = [SiteReport(**{**vars(SITE), "kind": "activation"}), SiteReport(**{**vars(SITE), "density": None})]
    assert gradient_density([SITE, larger, *others]) == pytest.approx(0.04)
    assert gradient_density(others) is None
