"""Checks saved states before they are loaded: a damaged one is an error that names the parameter and what would be right."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dct_compile.state.entry import EARLIER_COUNTERS, NUMBER, Entry, share_of
from dct_compile.state.spec import LATE
from dct_compile.triton_kernels.layout import COUNTERS
from dct_compile.triton_kernels.shares import UNIT


def check_entry(name: str, entry: Entry, numel: int) -> None:
    """Checks the saved state of one parameter.

    Fields that only other schemes keep may be missing. The scheme of an entry is known by its fields, so each needs a threshold or a tensor
    that no other scheme has.

    Args:
        name: The parameter's name, for the message.
        entry: Its saved state.
        numel: Elements of the parameter.

    Raises:
        ValueError: A field is missing, or has a type, a dtype, a shape or a value that it cannot have.
    """
    where = f"the state of {name}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a dict of tensors, not {_described(entry)}")
    _check_numbers(where, entry)
    if entry.keys() == {NUMBER}:  # nothing has been compressed yet
        return
    residual = entry.get("residual")
    if isinstance(residual, Tensor) and residual.numel() != numel:
        raise ValueError(f"{name} has {numel} elements, its residual in the state has {residual.numel()}")
    stages = {key: value for key, value in entry.items() if isinstance(value, dict)}
    others = (*stages, "owner", "owner_share", "owner_order", "density", NUMBER)
    plain = {key: value for key, value in entry.items() if key not in others}
    _check_tensors(where, plain, numel)
    unknown = sorted(stages.keys() - {"owner"})
    if unknown:
        raise ValueError(f"{where} has the stage {unknown[0]!r}; the only one beside the rank's own is 'owner'")
    if {"owner", "owner_share", "owner_order"} & entry.keys():
        _check_owner(where, entry, numel)


def _check_numbers(where: str, entry: Entry) -> None:
    number, density = entry.get(NUMBER, 0), entry.get("density", 1.0)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"{where}: {NUMBER} must be an integer >= 0, not {_described(number)}")
    if not isinstance(density, float) or not 0 < density <= 1:
        raise ValueError(f"{where}: density must be a float in (0, 1], not {_described(density)}")


def _check_owner(where: str, entry: Entry, numel: int) -> None:
    for key in ("owner", "owner_share"):
        if key not in entry:
            raise ValueError(f"{where} lacks {key}: the stage 'owner' comes with its owner_share [block, chunks, chunk, {UNIT}]")
    owner, share = entry["owner"], entry["owner_share"]
    if not isinstance(owner, dict):
        raise ValueError(f"{where}: owner must be a dict of tensors, not {_described(owner)}")
    known = _are_whole(share, 3) or (_are_whole(share, 4) and share[3] == UNIT)
    if not known or share[0] < 1 or not 0 <= share[2] < share[1]:
        raise ValueError(f"{where}: owner_share must be [block, chunks, chunk, {UNIT}], with a chunk below chunks, not {share!r}")
    if "owner_order" in entry and not _is_order(entry["owner_order"], numel):
        raise ValueError(f"{where}: owner_order must be [shape, dims] of {numel} elements, not {entry['owner_order']!r}")
    _check_tensors(f"{where}, owner", owner, share_of(numel, share).numel())


def _check_tensors(where: str, given: Mapping[str, Any], numel: int) -> None:
    known = {"residual": (torch.float32, [numel]), "counters": (torch.int64, [COUNTERS]), "threshold": (torch.float32, [])}
    known[LATE] = (torch.float32, [numel])
    for name in ("residual", "counters", "threshold"):
        if name not in given and (name != "threshold" or given.keys() <= known.keys()):
            raise ValueError(f"{where} lacks its {name}, {_words(*known[name])}")
    for name, value in given.items():
        if not isinstance(value, Tensor):
            wanted = _words(*known[name]) if name in known else "a tensor"
            raise ValueError(f"{where}: {name} must be {wanted}, not {_described(value)}")
        earlier = name == "counters" and (value.dtype, list(value.shape)) == (torch.int64, [EARLIER_COUNTERS])
        if name in known and (value.dtype, list(value.shape)) != known[name] and not earlier:
            raise ValueError(f"{where}: {name} must be {_words(*known[name])}, not {_words(value.dtype, list(value.shape))}")
        _check_values(f"{where}: {name}", name, value)


def _check_values(what: str, name: str, value: Tensor) -> None:
    if name == "residual":
        if not value.isfinite().all():
            raise ValueError(f"{what} has values that are NaN or infinite; all must be finite")
    elif value.is_floating_point():
        if name != LATE and value.isnan().any():  # a gradient scaler skips the step that it arrives in
            raise ValueError(f"{what} must not be NaN")
    elif value.numel() and value.min() < 0:
        raise ValueError(f"{what} has the value {value.min().item()}; it must count from 0")


def _are_whole(values: Any, count: int) -> bool:
    return isinstance(values, list | tuple) and len(values) == count and all(isinstance(value, int) for value in values)


def _is_order(value: Any, numel: int) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2 or not isinstance(value[0], list | tuple):
        return False
    shape, dims = value
    whole = _are_whole(shape, len(shape)) and _are_whole(dims, len(shape))
    return whole and sorted(dims) == list(range(len(shape))) and prod(shape) == numel


def _words(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _described(value: object) -> str:
    return _words(value.dtype, value.shape) if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"[:80]
