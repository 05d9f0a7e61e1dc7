"""Options: every bad value is refused with the key, the value and what is allowed."""

from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.config import DCTConfig
from dct_compile.link import ALLOWED as LINKS
from dct_compile.options import split_options
from tests.tracing import fake_group

FRACTION = "a number in (0, 1]: the fraction kept"
DTYPES = "one of 'float32', 'bfloat16', 'float16'"
THRESHOLDS = "one of 'exact', 'sampled', 'laplace' or a float"
DENSITIES = "a mapping of patterns (strings) of parameter names to numbers in (0, 1]"
PATTERNS = "a list of patterns (strings) of parameters, modules or source lines"
WARMUPS = "an integer >= 0, or a mapping {first step: density} from step 0 on, whose densities in (0, 1] fall down to dp_density"
NAN = float("nan")
INF = float("inf")

TOO_LARGE = (2**70, 2**63, np.float64(3), 10**400)
NO_FLOAT32 = (1e39, 1e308, 10**400, np.float64(1e39), Fraction(10**40))

BAD: list[tuple[str, Any, str]] = [
    *[("dp_density", value, FRACTION) for value in (0, -0.1, 1.01, 2, NAN, INF, "0.1", None, True, [0.1])],
    *[
        ("parameter_densities", value, DENSITIES)
        for value in (0.1, None, "a", ["a"], {"a": 0}, {"a": 1.1}, {"a": NAN}, {1: 0.1}, {"a": True})
    ],
    *[
        ("link", value, LINKS)
        for value in (
            "1Gb/s",
            "fast",
            0,
            1e9,
            True,
            {},
            {"bytes_per_s": 0},
            {"latency_s": 1},
            {"bytes_per_s": INF},
            {"bytes_per_s": 1, "x": 1},
        )
    ],
    *[
        ("activation_codec", value, "one of 'auto', 'threshold', 'int8', 'int4', 'bfloat16', 'dense', or a mapping of patterns (strings)")
        for value in ("int16", None, 8, {"a": "int16"}, {1: "int8"}, ("int8",), ["int8"])
    ],
    *[("mp_density", value, FRACTION) for value in (0.0, -1, 1.5, NAN, "all", None, False)],
    *[("threshold", value, THRESHOLDS) for value in ("exakt", "", "fixed")],
    *[("threshold", value, "one of exact, sampled, laplace or a float >= 0") for value in (-0.1, NAN, INF, True, None, ["exact"])],
    *[("threshold", value, "one of exact, sampled, laplace or a float >= 0, up to 3.4028234663852886e+38") for value in NO_FLOAT32],
    *[("refresh_interval", value, "an integer >= 1") for value in (0, -1, 1.0, "10", None, True)],
    *[(key, value, "an integer >= 1, up to 9223372036854775807") for key in ("refresh_interval", "rank") for value in TOO_LARGE],
    *[("min_numel", value, "an integer >= 0, up to 9223372036854775807") for value in TOO_LARGE],
    *[("capacity_factor", value, "a number >= 1, up to 3.4028234663852886e+38, float32's largest") for value in NO_FLOAT32],
    *[
        ("mp_density", value, FRACTION)
        for value in (np.float32(1.5), np.float64("nan"), Fraction(1, 10**400), torch.tensor(0.1), np.bool_(True))
    ],
    *[("refresh_warmup", value, "one of 'geometric', 'off'") for value in ("geometrical", "on", None, True, 1)],
    *[("hold_density", value, "True or False") for value in (0, 1, "no", None)],
    *[("error_feedback", value, "True or False") for value in (0, 1, "yes", None)],
    *[("arrival", value, "one of 'now', 'late'") for value in ("later", None, True)],
    *[("undo_discarded", value, "True or False") for value in (0, "no", None)],
    *[("first_moment", value, "one of 'auto', 'bypass', 'keep'") for value in ("off", None, True)],
    *[("second_moment", value, "one of 'auto', 'gaps', 'plain'") for value in ("gap", None, 1)],
    *[("start_iter", value, "an integer >= 0") for value in (-1, 1.0, "5", None, True, 2**63)],
    *[("density_warmup", value, WARMUPS) for value in (-1, 1.0, "5", None, True, 2**63, {}, {1: 0.01}, {0: 0.25, 9: 0.02}, [0.25])],
    *[("density_warmup", {0: value, 9: 0.01}, WARMUPS) for value in (0.01, 0.001, 1.5, NAN, "0.1", True)],
    *[("density_warmup", {0: 0.25, value: 0.01}, WARMUPS) for value in (-1, 0.5, "9", True)],
    *[("audit", value, "True or False") for value in (1, "yes", None)],
    *[("dp_value_dtype", value, DTYPES) for value in ("float64", "bf16", torch.bfloat16, None)],
    *[("mp_value_dtype", value, DTYPES) for value in ("int8", "half", torch.float32, 16)],
    *[("capacity_factor", value, "a number >= 1") for value in (0.99, 0, -1, NAN, INF, "2", None, True)],
    *[("min_numel", value, "an integer >= 0") for value in (-1, 0.5, "128", None, True)],
    *[("exempt", value, PATTERNS) for value in ("*.bias", [1], [None], None, 5, [["a"]])],
    *[("rank", value, "an integer >= 1") for value in (0, 1.0, True, None)],
    *[("mp_eval", value, "True or False") for value in (1, None, "no")],
    *[("mp_outputs", value, "True or False") for value in (1, None, "no")],
    *[("gradient_scheme", value, "one of 'auto', 'gather', 'owner', 'two_level', 'powersgd', 'random_k'") for value in ("ring", None, 1)],
    *[("ranks_per_host", value, "'auto', or an integer >= 1") for value in (0, 2.0, True, None, "8")],
    *[("embedding_codec", value, "one of 'int8', 'int4', 'threshold', 'dense'") for value in ("int2", "int 8", None, 8)],
    *[("parameter_codec", value, "one of 'int8', 'int4', 'bfloat16', 'dense'") for value in ("int2", "bf16", None, 8)],
    *[("sharded_gradients", value, "one of 'int8', 'dense'") for value in ("int4", "none", None, 8)],
    *[("inline_kernels", value, "True or False") for value in (1, 0, "yes", None)],
    *[("data_parallel", value, "True, False or a torch.distributed.ProcessGroup") for value in ("yes", 1, None, 0)],
]


@pytest.mark.parametrize(("key", "value", "allowed"), BAD, ids=lambda item: str(item)[:20])
def test_bad_values_are_refused(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=key) as error:
        split_options({key: value}, [])
    text = str(error.value)
    assert text.startswith(f"option {key!r} is {value!r} ({type(value).__name__}); allowed is {allowed}")


def test_every_field_has_bad_values() -> None:
    assert {key for key, _, _ in BAD} == {item.name for item in fields(DCTConfig)}


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [
        ("threshold", "exakt", "exact"),
        ("refresh_warmup", "geometrical", "geometric"),
        ("dp_value_dtype", "float64", "float16"),
        ("mp_value_dtype", "bfloat", "bfloat16"),
        ("gradient_scheme", "owners", "owner"),
        ("embedding_codec", "int-8", "int8"),
        ("parameter_codec", "bf16", "bfloat16"),
        ("sharded_gradients", "int_8", "int8"),
    ],
)
def test_nearest_choice_is_named(key: str, value: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        split_options({key: value}, [])


GOOD: list[dict[str, Any]] = [
    {"dp_density": 1, "mp_density": 1.0},
    {"dp_density": 1e-6},
    {"threshold": 0},
    {"threshold": 0.25},
    {"threshold": "laplace"},
    {"refresh_interval": 1, "refresh_warmup": "off"},
    {"capacity_factor": 1},
    {"min_numel": 0},
    {"start_iter": 0, "density_warmup": 0},
    {"start_iter": 2**63 - 1, "density_warmup": 2**63 - 1},
    {"exempt": []},
    {"parameter_densities": ()},
    {"exempt": ("*.bias", "norm.*")},
    {"exempt": ["*.bias"]},
    {"data_parallel": True},
    {"threshold": 3.4028234663852886e38, "capacity_factor": 3.4028234663852886e38},
    {"refresh_interval": 2**63 - 1, "min_numel": 2**63 - 1, "rank": 2**63 - 1},
    {"dp_density": 5e-324, "mp_density": 5e-324},
]


@pytest.mark.parametrize("options", GOOD)
def test_good_values_are_kept(options: dict[str, Any]) -> None:
    config, inductor = split_options(options, [])
    for key, value in options.items():
        assert getattr(config, key) == (tuple(value) if key == "exempt" else value)
    assert inductor == {}


NUMPY = {
    "dp_density": np.float32(0.01),
    "mp_density": np.float64(0.05),
    "threshold": np.float16(0.5),
    "capacity_factor": np.int32(2),
    "refresh_interval": np.int64(100),
    "min_numel": np.uint8(7),
    "rank": np.int16(3),
}


def test_numbers_of_numpy_become_those_of_python() -> None:
    """They are printed into generated code, and compared between ranks."""
    config, _ = split_options(NUMPY, [])
    kept = {key: getattr(config, key) for key in NUMPY}
    assert kept == {key: value.item() for key, value in NUMPY.items()}
    integers = {"refresh_interval", "min_numel", "rank"}
    assert {key: type(value) for key, value in kept.items()} == {key: int if key in integers else float for key in NUMPY}


def test_one_number_is_as_good_as_another() -> None:
    written = [repr(DCTConfig(dp_density=one, capacity_factor=one, threshold=one).comparable()) for one in (1, 1.0, np.float32(1))]
    assert written == [written[0]] * 3


def test_comparable_is_plain_and_tells_options_apart() -> None:
    plain = DCTConfig(exempt={"b", "a"}).comparable()  # type: ignore[arg-type]
    assert plain["exempt"] == ["a", "b"]
    assert plain["data_parallel"] is False
    assert set(plain) == {item.name for item in fields(DCTConfig)}
    assert DCTConfig().comparable() == DCTConfig().comparable()
    assert DCTConfig().comparable() != DCTConfig(mp_density=0.1).comparable()


def test_a_schedule_is_kept_in_order_and_compared_as_it_was_given() -> None:
    config = DCTConfig(density_warmup={np.int64(9): np.float64(0.01), 0: 0.25})
    assert config.density_warmup == ((0, 0.25), (9, 0.01))
    assert replace(config, min_numel=0).density_warmup == config.density_warmup
    assert config.comparable()["density_warmup"] == {0: 0.25, 9: 0.01}
    assert isinstance(hash(config), int)


def test_process_group_is_compared_by_name() -> None:
    with fake_group(2) as group:
        config = DCTConfig(data_parallel=group)
        assert config.data_parallel is group
        assert config.comparable()["data_parallel"] == group.group_name


def test_options_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError):
        DCTConfig().mp_density = 0.5  # type: ignore[misc]
    assert isinstance(hash(DCTConfig(exempt=["a"])), int)  # type: ignore[arg-type]
