"""What one run of ``dct train`` is told to do, the same for every rank."""

import ast
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch._inductor import list_options

from dct_compile.config import split_options
from dct_compile.models.datasets import Dataset, load

BACKENDS = ("dense", "dct")
MODELS = ("dlrm",)
PREVIEW_SAMPLES = 1000


@dataclass(frozen=True)
class Settings:
    """``options`` are those of the dct backend; ``batch_size`` counts all ranks; ``check_every`` steps replicas are compared."""

    model: str
    dataset: str
    criteo_path: Path | None
    max_samples: int | None
    dp: int
    mp: int
    backends: tuple[str, ...]
    options: dict[str, Any]
    seeds: int
    epochs: int
    batch_size: int
    lr: float
    check_every: int
    out: Path

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp * self.mp

    def load(self, seed: int, max_samples: int | None = None) -> Dataset:
        """Returns the data set, split by ``seed``. Raises what :func:`dct_compile.models.datasets.load` raises."""
        return load(self.dataset, seed, self.criteo_path, max_samples or self.max_samples)

    def check(self) -> None:
        """Raises ``ValueError`` or ``MissingData`` for what would otherwise fail on the ranks, once they are started."""
        split_options(self.options, list_options())
        if self.batch_size % self.world_size:
            raise ValueError(f"a batch of {self.batch_size} cannot be shared equally by {self.dp} x {self.mp} ranks")
        # The whole Criteo log takes minutes to read: its first lines tell whether it is one.
        preview = self.dataset == "criteo"
        data = self.load(0, min(PREVIEW_SAMPLES, self.max_samples or PREVIEW_SAMPLES) if preview else None)
        if self.mp > len(data.tables):
            raise ValueError(f"{self.mp} model-parallel ranks are more than the {len(data.tables)} tables of {self.dataset}")
        if not preview and len(data.train) < self.batch_size:
            raise ValueError(f"a batch of {self.batch_size} is larger than the training part of {self.dataset} ({len(data.train)} samples)")

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def parse_value(text: str) -> Any:
    """Returns an option's value as JSON or Python would read it (``true``, ``0.1``, ``["*.bias"]``, ``None``), else the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """``key=value`` texts as a dict; ``ValueError`` for a text without ``=`` and for a key given twice."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.strip():
            raise ValueError(f"{pair!r} is not of the form key=value")
        if key.strip() in options:
            raise ValueError(f"{key.strip()!r} is given twice")
        options[key.strip()] = parse_value(text)
    return options
