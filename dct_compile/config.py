"""The options of ``torch.compile(model, backend="dct", options={...})``."""

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from dct_compile import option_checks as checks
from dct_compile.link import Link
from dct_compile.warmup import Schedule

if TYPE_CHECKING:  # the command line reads the options without torch, whose import takes seconds
    import torch
    from torch.distributed import ProcessGroup

MP_VALUE_DTYPES = ("float32", "bfloat16", "float16")
SECOND_MOMENTS = ("auto", "gaps", "plain")
DP_VALUE_DTYPES = (*MP_VALUE_DTYPES, "int8")
THRESHOLDS = ("exact", "sampled", "laplace")
REFRESH_WARMUPS = ("geometric", "off")
FIRST_MOMENTS = ("auto", "bypass", "keep")
_LATE = 0.1
"""The largest density at which an element waits as long as a first moment usually looks back: ten steps."""
GRADIENT_SCHEMES = ("auto", "gather", "owner", "two_level", "powersgd", "random_k")
SHARD_OPTIONS = ("parameter_codec", "sharded_gradients")
"""The options of sharded data parallelism alone."""
ROW_OPTIONS = ("activation_codec", "mp_density", "mp_value_dtype", "mp_eval", "embedding_codec")
"""The options that say nothing about gradients."""
ACTIVATION_CODECS = ("auto", "threshold", "int8", "int4", "bfloat16", "dense")
EMBEDDING_CODECS = ("int8", "int4", "threshold", "dense")
PARAMETER_CODECS = ("int8", "int4", "bfloat16", "dense")
SHARDED_GRADIENTS = ("int8", "dense")


@dataclass(frozen=True)
class DCTConfig:
    """The options: which tensors are compressed, and by how much.

    Densities are fractions KEPT (the paper's eta is the fraction dropped) [Gupta21]. Numbers of other libraries, such as
    numpy.float32(0.1), are kept as Python's. The text below a field is its meaning in Markdown, as ``dct options`` prints it.

    Raises:
        ValueError: A field has a wrong type or is out of range. The message has the field, its value and the allowed ones.
    """

    dp_density: float = 0.01
    """Fraction of a gradient that is sent per step."""
    start_iter: int = 0
    """Gradients are averaged dense for the first so many exchanges of a parameter."""
    density_warmup: int | Mapping[int, float] | Schedule = 0
    """Exchanges after `start_iter` in which the density goes down to `dp_density`, from 0.25 by factors of 4; or a schedule of its own,
    such as `{0: 0.25, 500: 0.05, 2000: 0.01}`. Under AdamW it did harm, and `start_iter` none ([measured](docs/accuracy.md)).
    """
    parameter_densities: tuple[tuple[str, float], ...] = ()
    """`{pattern of parameter names: density}`: densities of their own; the first pattern that matches counts; 1 leaves a parameter
    dense.
    """
    activation_codec: str | tuple[tuple[str, str], ...] = "auto"
    """How activations travel: `"threshold"` sends the largest entries of each row, `"int8"` and `"int4"` rows with stochastic rounding,
    `"bfloat16"`, `"dense"`; `"auto"` takes the threshold behind a ReLU and int8 elsewhere ([measured](docs/accuracy.md#activations)). Or
    `{pattern: codec}`, with patterns as those of `exempt`.
    """
    mp_density: float = 0.05
    """Fraction of a row that the threshold sends; with 1, and `activation_codec="auto"`, activations stay dense."""
    threshold: str | float = "exact"
    """`"exact"`, `"sampled"` (3 to 8 % of a large gradient), `"laplace"`, or a float: a fixed absolute threshold, of the scaled loss under
    a `GradScaler`."""
    refresh_interval: int = 1000
    """Steps between two choices of a gradient's threshold."""
    refresh_warmup: str = "geometric"
    """Refresh often at first; `"off"` is the paper's plain schedule."""
    hold_density: bool = True
    """Between two choices, let the threshold follow what each step has kept."""
    error_feedback: bool = True
    """Keep what was not sent."""
    arrival: str = "now"
    """The gradients that a step under DDP applies: `"now"`, its own; `"late"`, those of the step before, whose exchange runs beside it, so
    that a step takes as long as the longer of both. It costs accuracy where the learning rate is high: measure it.
    `dct_compile.drain(model)` hands back what is under way ([docs/design.md](docs/design.md#gradients)).
    """
    undo_discarded: bool = True
    """Take out of the residual what a discarded gradient left there; takes memory for a second residual."""
    first_moment: str = "auto"
    """`"bypass"`: Adam and SGD step compressed parameters without first moment or momentum, because what arrives has added up already;
    `"keep"`; `"auto"` bypasses up to a density of 0.1.
    """
    second_moment: str = "auto"
    """`"gaps"`: Adam's second moment spreads the square of what arrives over the steps that it has waited; `"plain"`; `"auto"` does so
    where they are more than `1 / (1 - beta2)`.
    """
    dp_value_dtype: str = "bfloat16"
    """Dtype of a gradient's value on the wire: also `"float32"`, `"float16"`, and `"int8"` with a scale per 4096 elements."""
    mp_value_dtype: str = "bfloat16"
    """Dtype of an activation's value on the wire: also `"float32"` and `"float16"`."""
    capacity_factor: float = 1.1
    """Headroom of a payload; what does not fit waits in the residual and is counted."""
    min_numel: int = 128
    """Smaller gradients stay dense."""
    exempt: tuple[str, ...] = ()
    """Patterns of what stays dense: gradients and shards by parameter name (`"*.bias"`), activations and embeddings by module (`"head"`,
    `"blocks.*"`), short name (`"top.0: model.py:12"`) or source line (`"model.py:12"`).
    """
    mp_eval: bool = True
    """Keep masking activations in evaluation."""
    mp_outputs: bool = False
    """Send also activations and embeddings that a graph returns as they arrive, such as gathered logits, as bfloat16 (or by the codec that
    you name).
    """
    gradient_scheme: str = "auto"
    """How gradients travel: `"gather"` sends payloads to all ranks, `"owner"` through owners of shares, `"two_level"` (DDP alone) adds up
    dense on each host and sends payloads between hosts, `"auto"` takes the one of these that costs least; `"powersgd"` sends low-rank
    factors; `"random_k"` sends random elements, the same on all ranks.
    """
    ranks_per_host: int | str = "auto"
    """Ranks of a host, numbered one after the other, for `"two_level"`; 1 for none; `"auto"` takes torchrun's `LOCAL_WORLD_SIZE`."""
    rank: int = 1
    """Columns of the factors of `"powersgd"`."""
    link: str | Link | None = "auto"
    """The link between the ranks, by whose seconds a collective is compressed or stays dense: `"auto"` measures it, once per process group
    (ranks on one machine's CPU stay dense); `"1Gbit/s"` or `{"bytes_per_s": 1.25e8, "latency_s": 5e-5}` is assumed; `None` lets the bytes
    decide.
    """
    embedding_codec: str = "int8"
    """How embeddings travel: `"int8"` or `"int4"` rows, `"threshold"` as activations, `"dense"`."""
    parameter_codec: str = "int8"
    """How `fully_shard` and graphs gather parameters: `"int8"` or `"int4"` blocks, `"bfloat16"`, `"dense"`."""
    sharded_gradients: str = "int8"
    """How the gradients of shards are reduced: `"int8"` blocks, `"dense"`; in a graph only where `parameter_codec` is not `"dense"`."""
    data_parallel: "bool | ProcessGroup" = False
    """Without DDP: average gradients over all ranks (`True`) or over a process group, such as `mesh["dp"].get_group()`. All ranks must run
    the first forward that has gradients enabled: it makes parameters equal. Shards of parameters are left alone.
    """
    audit: bool = False
    """Graphs that average gradients themselves note each rank's own, for `dct_compile.audit`."""
    inline_kernels: bool = False
    """On CUDA: Inductor sees the kernel launches instead of opaque operators ([docs/kernels.md](docs/kernels.md#registration))."""

    def __post_init__(self) -> None:
        for name in ("hold_density", "error_feedback", "undo_discarded", "mp_eval", "mp_outputs", "audit", "inline_kernels"):
            checks.check_bool(name, getattr(self, name))
        self._keep("dp_density", checks.fraction("dp_density", self.dp_density))
        self._keep("start_iter", checks.integer("start_iter", self.start_iter, 0))
        self._keep("density_warmup", checks.warmup("density_warmup", self.density_warmup, self.dp_density))
        self._keep("parameter_densities", checks.densities("parameter_densities", self.parameter_densities))
        self._keep("activation_codec", checks.codecs("activation_codec", self.activation_codec, ACTIVATION_CODECS))
        self._keep("mp_density", checks.fraction("mp_density", self.mp_density))
        if isinstance(self.threshold, str):
            checks.check_choice("threshold", self.threshold, THRESHOLDS, " or a float")
        else:
            self._keep("threshold", checks.number("threshold", self.threshold, 0.0, f"one of {', '.join(THRESHOLDS)} or a float >= 0"))
        self._keep("refresh_interval", checks.integer("refresh_interval", self.refresh_interval, 1))
        checks.check_choice("refresh_warmup", self.refresh_warmup, REFRESH_WARMUPS)
        more = "" if self.error_feedback else " with error_feedback=False: no residual could take back what arrives late"
        checks.check_choice("arrival", self.arrival, ("now", "late") if self.error_feedback else ("now",), more)
        checks.check_choice("second_moment", self.second_moment, SECOND_MOMENTS)
        checks.check_choice("first_moment", self.first_moment, FIRST_MOMENTS)
        checks.check_choice("dp_value_dtype", self.dp_value_dtype, DP_VALUE_DTYPES)
        checks.check_choice("mp_value_dtype", self.mp_value_dtype, MP_VALUE_DTYPES)
        self._keep("capacity_factor", checks.number("capacity_factor", self.capacity_factor, 1.0, "a number >= 1"))
        self._keep("min_numel", checks.integer("min_numel", self.min_numel, 0))
        self._keep("exempt", checks.patterns("exempt", self.exempt))
        checks.check_choice("gradient_scheme", self.gradient_scheme, GRADIENT_SCHEMES)
        if self.ranks_per_host != "auto":
            self._keep("ranks_per_host", checks.integer("ranks_per_host", self.ranks_per_host, 1, "'auto', or "))
        if self.gradient_scheme == "powersgd" and self.density_warmup:
            raise checks.error("density_warmup", self.density_warmup, "0 with gradient_scheme='powersgd', whose factors have no density")
        self._keep("rank", checks.integer("rank", self.rank, 1))
        self._keep("link", checks.link("link", self.link))
        checks.check_choice("embedding_codec", self.embedding_codec, EMBEDDING_CODECS)
        checks.check_choice("parameter_codec", self.parameter_codec, PARAMETER_CODECS)
        checks.check_choice("sharded_gradients", self.sharded_gradients, SHARDED_GRADIENTS)
        checks.check_ranks("data_parallel", self.data_parallel)

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def density_of(self, parameter: str) -> float:
        """Returns the fraction of the gradient of ``parameter``, by name, that is sent per step."""
        matching = (density for pattern, density in self.parameter_densities if fnmatch.fnmatchcase(parameter, pattern))
        return next(matching, self.dp_density)

    def bypasses(self, density: float) -> bool:
        """Returns True if optimizers leave out the first moment of a parameter of that density.

        A mean over ten steps matters where an element waits longer than that.
        """
        return self.first_moment == "bypass" or (self.first_moment == "auto" and density <= _LATE)

    def gap(self, density: float) -> float:
        """Returns the steps that an element of a parameter of that density waits, for the second moment.

        0 where that is to stay as it is, infinity where it never is.
        """
        return {"auto": 1 / density, "gaps": float("inf"), "plain": 0.0}[self.second_moment]

    @property
    def codec_patterns(self) -> tuple[str, ...]:
        """The patterns of ``activation_codec``."""
        return () if isinstance(self.activation_codec, str) else tuple(pattern for pattern, _ in self.activation_codec)

    @property
    def threshold_method(self) -> str:
        """The ops' ``method``: the option's own word, or "fixed" for an absolute value."""
        return self.threshold if isinstance(self.threshold, str) else "fixed"

    @property
    def fixed_threshold(self) -> float:
        return 0.0 if isinstance(self.threshold, str) else float(self.threshold)

    @property
    def dp_dtype(self) -> "torch.dtype":
        return _torch_dtype(self.dp_value_dtype)

    @property
    def mp_dtype(self) -> "torch.dtype":
        return _torch_dtype(self.mp_value_dtype)

    def check_single_average(self) -> None:
        """Checks that ``data_parallel`` is not set, where DDP averages the gradients.

        Raises:
            ValueError: It is set.
        """
        if self.data_parallel is not False:
            raise ValueError(
                "option 'data_parallel' is set and the model is wrapped in DDP: gradients would be averaged twice; remove one of the two"
            )

    def for_gradients(self) -> dict[str, Any]:
        """Returns the options that say how gradients travel by all_reduce, as plain values."""
        return {name: value for name, value in self.comparable().items() if name not in (*ROW_OPTIONS, *SHARD_OPTIONS)}

    def comparable(self) -> dict[str, Any]:
        """Returns the fields as plain values, the same on all ranks that were given the same options."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["data_parallel"] = self.data_parallel if isinstance(self.data_parallel, bool) else self.data_parallel.group_name
        values["link"] = asdict(self.link) if isinstance(self.link, Link) else self.link
        values["activation_codec"] = self.activation_codec if isinstance(self.activation_codec, str) else dict(self.activation_codec)
        values["exempt"] = list(self.exempt)
        values["density_warmup"] = self.density_warmup if isinstance(self.density_warmup, int) else dict(self.density_warmup)
        values["parameter_densities"] = [list(pair) for pair in self.parameter_densities]
        return values


def _torch_dtype(name: str) -> "torch.dtype":
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
