"""The options of ``torch.compile(model, backend="dct", options={...})``."""

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
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
GRADIENT_SCHEMES = ("auto", "gather", "owner", "powersgd", "random_k")
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
    numpy.float32(0.1), are kept as Python's.

    Raises:
        ValueError: A field has a wrong type or is out of range. The message has the field, its value and the allowed ones.
    """

    dp_density: float = 0.01
    """Fraction of a parameter's gradient that is sent per step, in (0, 1]; 1 leaves gradients dense."""
    start_iter: int = 0
    """Gradients are averaged dense for this many exchanges of a parameter, before they are compressed."""
    density_warmup: int | Mapping[int, float] | Schedule = 0
    """Exchanges after ``start_iter`` in which the density goes down to ``dp_density``, from 0.25 by factors of 4; or a schedule of its own,
    {first exchange: density}, counted from ``start_iter`` on. Until then every step chooses its thresholds. Under AdamW it did harm where
    ``start_iter`` did none (docs/accuracy.md).
    """
    parameter_densities: tuple[tuple[str, float], ...] = ()
    """Densities of parameters by patterns (``fnmatch``) of their names, given as a mapping. The first pattern that matches counts, before
    ``dp_density``.
    """
    activation_codec: str | tuple[tuple[str, str], ...] = "auto"
    """The codec of activations: "threshold" sends the largest entries of each row, "int8" and "int4" send rows rounded stochastically;
    "bfloat16"; "dense". "auto" takes "threshold" behind a ReLU, "bfloat16" for what ``mp_outputs`` allows, "int8" for all others. Or a
    mapping of patterns, as those of ``exempt``, to codecs: the first that matches counts, for embeddings, too.
    """
    mp_density: float = 0.05
    """Fraction of a row that "threshold" sends, in (0, 1]; with 1, and "auto", activations stay dense."""
    threshold: str | float = "exact"
    """The choice of a threshold: "exact" k-th largest magnitude, "sampled" (gradients only), "laplace" fit, or a fixed absolute value."""
    refresh_interval: int = 1000
    """Steps between two choices of a gradient's threshold (the paper's threshold life-span L)."""
    refresh_warmup: str = "geometric"
    """The schedule: "geometric" refreshes often at first, ever less often up to ``refresh_interval``; "off" is the paper's."""
    hold_density: bool = True
    """Between two choices, let a gradient's threshold follow what each step has kept, so that ``dp_density`` is held."""
    error_feedback: bool = True
    """Keep what was not sent and add it to the next gradient."""
    arrival: str = "now"
    """The step that a mean of gradients joins under DDP: "now", its own, or "late", the next one, beside which the exchange runs."""
    undo_discarded: bool = True
    """Take out of the residual what a discarded gradient (``zero_grad`` without a step) has left there. Takes memory for a second residual,
    and a copy of it per step.
    """
    first_moment: str = "auto"
    """The first moment of Adam and its kin, and the momentum of SGD, for gradients that arrive a few elements at a time: "bypass" leaves it
    out, because what arrives has added up over many steps; "keep" steps as ever; "auto" is "bypass" where the optimizer is known.
    """
    second_moment: str = "auto"
    """The second moment of Adam and its kin, where the first one is bypassed: "gaps" spreads the square of what arrives over the steps that
    it has waited, and takes memory to know them; "plain" does not; "auto" does so where an element waits longer than beta2 looks back.
    """
    dp_value_dtype: str = "bfloat16"
    """Dtype of a gradient value on the wire ("int8": multiples of a scale per 4096 elements); the rounding error stays in the residual."""
    mp_value_dtype: str = "bfloat16"
    """Dtype of an activation (gradient) value on the wire."""
    capacity_factor: float = 1.1
    """A payload holds ``capacity_factor * density * numel`` entries. Others stay in the residual and are counted. At least 1."""
    min_numel: int = 128
    """Tensors with fewer elements stay dense."""
    exempt: tuple[str, ...] = ()
    """Patterns (``fnmatch``) of what stays dense: gradients by parameter name; activations and embeddings, with their gradients, by module
    path, short name (``top.0: model.py:12``) or source line (``model.py:12``, with any leading folders).
    """
    mp_eval: bool = True
    """Keep masking activations in evaluation (graphs without a backward), as the paper does."""
    mp_outputs: bool = False
    """Compress also activations and embeddings that a graph returns as they arrive, such as gathered logits."""
    gradient_scheme: str = "auto"
    """The scheme for gradients: "gather" sends payloads to all ranks, "owner" sends them through owners of shares, "auto" takes whichever
    sends less; "powersgd" sends low-rank factors; "random_k" sends elements that all ranks draw alike.
    """
    rank: int = 1
    """Columns of the factors of "powersgd"."""
    link: str | Link | None = "auto"
    """The link between the ranks, by whose seconds a collective is compressed or left dense: "auto" measures it once per process group, and
    leaves all dense where the ranks share one machine's CPU; a rate ("1Gbit/s") or a mapping {"bytes_per_s": ..., "latency_s": ...} is
    assumed; ``None`` lets the bytes decide.
    """
    embedding_codec: str = "int8"
    """The codec of an embedding exchange: "int8" or "int4" rows, rounded stochastically; "threshold" like activations; "dense"."""
    parameter_codec: str = "int8"
    """The codec of the all_gather of parameter shards (FSDP): "int8" or "int4" blocks, rounded stochastically; "bfloat16"; "dense"."""
    sharded_gradients: str = "int8"
    """The codec of the reduce_scatter of their gradients: "int8" blocks, rounded stochastically; "dense"."""
    data_parallel: "bool | ProcessGroup" = field(default=False, metadata={"allowed": "True, False or a ProcessGroup"})
    """Without DDP: average gradients over all ranks (True) or over a process group. Parameters are made equal before the first forward
    that runs with gradients enabled, which all ranks must run. Shards of a parameter are left alone.
    """
    audit: bool = False
    """Let graphs that average gradients themselves note each rank's own, for :func:`dct_compile.audit`. For tests: it takes memory."""
    inline_kernels: bool = False
    """On CUDA: let Inductor see the kernel launches instead of the operators ``torch.ops.dct``."""

    def __post_init__(self) -> None:
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
        checks.check_bool("hold_density", self.hold_density)
        checks.check_bool("error_feedback", self.error_feedback)
        more = "" if self.error_feedback else " with error_feedback=False: no residual could take back what arrives late"
        checks.check_choice("arrival", self.arrival, ("now", "late") if self.error_feedback else ("now",), more)
        checks.check_bool("undo_discarded", self.undo_discarded)
        checks.check_choice("second_moment", self.second_moment, SECOND_MOMENTS)
        checks.check_choice("first_moment", self.first_moment, FIRST_MOMENTS)
        checks.check_choice("dp_value_dtype", self.dp_value_dtype, DP_VALUE_DTYPES)
        checks.check_choice("mp_value_dtype", self.mp_value_dtype, MP_VALUE_DTYPES)
        self._keep("capacity_factor", checks.number("capacity_factor", self.capacity_factor, 1.0, "a number >= 1"))
        self._keep("min_numel", checks.integer("min_numel", self.min_numel, 0))
        self._keep("exempt", checks.patterns("exempt", self.exempt))
        checks.check_bool("mp_eval", self.mp_eval)
        checks.check_bool("mp_outputs", self.mp_outputs)
        checks.check_choice("gradient_scheme", self.gradient_scheme, GRADIENT_SCHEMES)
        if self.gradient_scheme == "powersgd" and self.density_warmup:
            raise checks.error("density_warmup", self.density_warmup, "0 with gradient_scheme='powersgd', whose factors have no density")
        self._keep("rank", checks.integer("rank", self.rank, 1))
        self._keep("link", checks.link("link", self.link))
        checks.check_choice("embedding_codec", self.embedding_codec, EMBEDDING_CODECS)
        checks.check_choice("parameter_codec", self.parameter_codec, PARAMETER_CODECS)
        checks.check_choice("sharded_gradients", self.sharded_gradients, SHARDED_GRADIENTS)
        checks.check_ranks("data_parallel", self.data_parallel)
        checks.check_bool("audit", self.audit)
        checks.check_bool("inline_kernels", self.inline_kernels)

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
