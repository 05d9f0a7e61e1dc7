"""``torch.set_default_device``: what is made for a tensor lies where that tensor is. "meta" stands for a GPU."""

from collections.abc import Iterator

import pytest
import torch

from dct_compile.moments import _tensor
from dct_compile.state.bucket import BucketState
from dct_compile.state.entry import share_of
from dct_compile.state.spec import StateSpec, StateTensor, counters_of, residual_of

CPU = torch.device("cpu")
PART = ((0, 64),)


@pytest.fixture
def default_meta() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def random_state() -> BucketState:
    """Returns the state of "powersgd", whose right factor is random and the same on all ranks at first."""
    factor = StateTensor("right_factor", (64,), torch.float32, PART, fill=None)
    return BucketState([], StateSpec((64,), (residual_of(PART), factor, counters_of(1))), CPU)


def test_random_state_is_the_same_with_any_default_device(request: pytest.FixtureRequest) -> None:
    expected = random_state().tensors["right_factor"]
    request.getfixturevalue("default_meta")
    found = random_state().tensors["right_factor"]
    assert found.device == CPU
    assert found.equal(expected)
    assert found.count_nonzero() == 64


def test_numbers_for_moments_are_on_the_device_of_their_parameters(default_meta: None) -> None:
    found = _tensor((1.0, 2.0), torch.float32, CPU)
    assert found.device == CPU
    assert found.tolist() == [1.0, 2.0]


def test_shares_of_loaded_states_are_found(request: pytest.FixtureRequest) -> None:
    shares = [[256, 2, 1, 256], [256, 2, 1]]
    expected = [share_of(1000, share) for share in shares]
    request.getfixturevalue("default_meta")
    for share, elements in zip(shares, expected, strict=True):
        assert share_of(1000, share).equal(elements)
