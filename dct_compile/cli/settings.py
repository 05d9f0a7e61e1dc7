"""What one run of ``dct train`` is told to do, the same for every rank."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dct_compile.cli.backends import BACKENDS, HOOKS
from dct_compile.cli.parsing import check_options
from dct_compile.models.optimization import Optimization
from dct_compile.models.recipes import RECIPES

if TYPE_CHECKING:
    from dct_compile.models.tasks import Task

ASSUMED_LINK = "1Gbit/s"
"""Ranks of one machine stand for hosts on Ethernet."""
OWN_RATES: dict[tuple[str, str], dict[str, float]] = {("dlrm", "adagrad"): {"dct": 0.08}}
"""Learning rates of methods, by model and optimizer, where a method is better at another one than the recipe's (docs/accuracy.md)."""


@dataclass(frozen=True)
class Settings:
    """``options`` are those of the dct backend; ``batch_size`` counts all ranks; ``check_every`` steps replicas are compared.

    Either ``epochs`` or ``steps`` is given, of each training. ``rates``: learning rates of backends that have one of their own.
    """

    model: str
    dataset: str
    criteo_path: Path | None
    fashion_mnist_path: Path | None
    max_samples: int | None
    dp: int
    mp: int
    backends: tuple[str, ...]
    options: dict[str, Any]
    seeds: int
    epochs: int | None
    steps: int | None
    batch_size: int
    optimization: Optimization
    rates: dict[str, float]
    check_every: int
    out: Path

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp * self.mp

    def optimization_for(self, backend: str) -> Optimization:
        """Returns the optimization of the trainings by ``backend``."""
        return replace(self.optimization, lr=self.rates.get(backend, self.optimization.lr))

    def task(self) -> "Task":
        """Returns what is trained. Nothing is read yet."""
        # Late, so that `dct train --help` and usage errors do not wait for torch.
        from dct_compile.models.tasks import TASKS, DataSource

        path = {"criteo": self.criteo_path, "fashion-mnist": self.fashion_mnist_path}.get(self.dataset)
        return TASKS[self.model](DataSource(self.dataset, path, self.max_samples), self.batch_size)

    def steps_of(self, task: "Task", seed: int) -> int:
        """Returns the number of steps of the training of ``seed``."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return task.steps(seed, self.epochs)

    def check(self) -> None:
        """Raises ``ValueError`` or ``MissingData`` for what would otherwise fail on the ranks, once they are started."""
        check_options(self.options)
        if self.options.get("data_parallel", False) is not False:
            raise ValueError("option 'data_parallel' is for models without DDP: the trainings of this command wrap theirs in DDP")
        known = RECIPES[self.model].datasets
        if self.dataset not in known:
            raise ValueError(f"{self.model} is not trained on {self.dataset}: its data sets are {', '.join(known)}")
        if self.mp > 1 and RECIPES[self.model].mp is None:
            raise ValueError(f"{self.model} is trained data parallel only: it needs --mp 1, not --mp {self.mp}")
        if self.batch_size % self.world_size:
            raise ValueError(f"a batch of {self.batch_size} cannot be shared equally by {self.dp} x {self.mp} ranks")
        hooks = [name for name in self.backends if name in HOOKS]
        if hooks and (self.mp > 1 or self.dp == 1):
            raise ValueError(
                f"{', '.join(hooks)}: torch's hooks average the gradients of data-parallel ranks and need --mp 1 and --dp 2 or more, "
                f"not --mp {self.mp} and --dp {self.dp}"
            )
        self.task().check(self.mp)

    def as_json(self) -> dict[str, Any]:
        """Plain values; those of the optimizer stand beside the others, if it has them."""
        values = asdict(self)
        optimization = values.pop("optimization")
        unused = {"sgd": ("betas",), "adagrad": ("momentum", "betas")}.get(self.optimization.optimizer, ("momentum",))
        values |= {key: value for key, value in optimization.items() if key not in unused}
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def parse_rates(texts: Iterable[str]) -> tuple[float | None, dict[str, float]]:
    """Returns the learning rate of all backends, if one was given, and those of single ones.

    Args:
        texts: Each is ``rate`` or ``backend=rate``.

    Raises:
        ValueError: A text is neither, a rate is not a number above 0, or one is given twice.
    """
    rates: dict[str, float] = {}
    for text in texts:
        backend, _, number = text.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not 0 < rate < float("inf") or (backend and backend not in BACKENDS):
            raise ValueError(f"--lr {text!r} is not of the form rate or backend=rate, with a rate above 0 and one of {', '.join(BACKENDS)}")
        if backend in rates:
            raise ValueError(f"--lr is given twice for {backend or 'all backends'}")
        rates[backend] = rate
    return rates.pop("", None), rates


def optimization_of(
    model: str,
    *,
    optimizer: str | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    beta1: float | None = None,
    beta2: float | None = None,
    warmup: int | None = None,
    schedule: str | None = None,
) -> Optimization:
    """Returns the optimization of ``model`` with what was asked for in place of its own.

    Raises ``ValueError`` for a number that the optimizer does not have.
    """
    recipe = RECIPES[model]
    own = recipe.optimization
    name = optimizer or own.optimizer
    adam = ("adam", "adamw")
    for flag, value, users in (("--momentum", momentum, ("sgd",)), ("--beta1", beta1, adam), ("--beta2", beta2, adam)):
        if value is not None and name not in users:
            raise ValueError(f"{flag} is a number of {' and '.join(users)}; the optimizer is {name}")
    betas = (own.betas[0] if beta1 is None else beta1, own.betas[1] if beta2 is None else beta2)
    return replace(
        own,
        optimizer=name,
        lr=recipe.rates[name] if lr is None else lr,
        momentum=own.momentum if momentum is None else momentum,
        betas=betas,
        warmup=own.warmup if warmup is None else warmup,
        schedule=schedule or own.schedule,
    )
