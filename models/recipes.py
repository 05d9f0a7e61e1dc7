"""How each model is trained unless something else is asked for. Plain values, which need no torch: the help of ``dct train`` shows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dct_compile.models.optimization import Optimization

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""The folder of Debian's package dataset-fashion-mnist."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained unless something else is asked for.

    ``datasets``: the first one is the default. ``rates``: the learning rate for each optimizer; ``optimization`` has that of its own
    optimizer. ``steps`` per training, else ``epochs``. ``mp``: model-parallel ranks; ``None`` for a model that cannot be split.
    """

    datasets: tuple[str, ...]
    optimization: Optimization
    rates: Mapping[str, float]
    batch_size: int
    seeds: int = 3
    epochs: int = 1
    steps: int | None = None
    mp: int | None = None


RECIPES: Mapping[str, Recipe] = {
    "dlrm": Recipe(
        datasets=("movielens", "flights", "criteo", "synthetic"),
        optimization=Optimization("adagrad", 0.03, warmup=50),
        rates={"adagrad": 0.03, "adam": 0.001, "adamw": 0.001, "sgd": 0.05},
        batch_size=256,
        epochs=2,
        mp=2,
    ),
    "gpt": Recipe(
        datasets=("shakespeare",),
        optimization=Optimization("adamw", 0.004, betas=(0.9, 0.95), weight_decay=0.01, warmup=50, schedule="cosine"),
        rates={"adagrad": 0.02, "adam": 0.004, "adamw": 0.004, "sgd": 0.1},
        batch_size=16,
        steps=1000,
    ),
    "resnet": Recipe(
        datasets=("fashion-mnist",),
        optimization=Optimization("sgd", 0.1, momentum=0.9, weight_decay=5e-4, schedule="cosine"),
        rates={"adagrad": 0.02, "adam": 0.002, "adamw": 0.002, "sgd": 0.1},
        batch_size=128,
        epochs=2,
    ),
}
"""By the model's name."""
