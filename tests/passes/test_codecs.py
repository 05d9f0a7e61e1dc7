"""The codec of each kind of activation: the default, what the options change, and by which patterns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hand_made_sites import decide, make_site
from tests.small_models import ColumnParallel, exchange, gather, leaf, reduce_scatter
from tests.tracing import Trace, trace

MASKED = ["row threshold, 4 of 64 kept", "the forward's mask, values only"]
INT8 = "int8 rows with stochastic rounding"


def by_default(function: Callable[..., Any], *inputs: Any, **options: Any) -> Trace:
    return trace(function, *inputs, **{"activation_codec": "auto", "mp_outputs": False, **options})


DEFAULTS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "behind a ReLU": (lambda x: exchange(x.relu()).sin(), MASKED),
    "a ReLU of short rows": (lambda x: exchange(x.relu().view(-1, 8)).sin(), [INT8, INT8]),
    "hidden states": (lambda x: exchange(x.tanh()).sin(), [INT8, INT8]),
    "an input of the model": (lambda x: gather(x * 1).sin(), [INT8, INT8]),
    "logits, used": (lambda x: gather(x.tanh()).log_softmax(1), [INT8, INT8]),
    "partial sums": (lambda x: reduce_scatter(x.tanh()).sin(), [INT8, INT8]),
}


@pytest.mark.parametrize("case", DEFAULTS)
def test_default_of_each_kind(case: str) -> None:
    function, reasons = DEFAULTS[case]
    assert by_default(function, leaf(16, 64)).reasons == reasons


@pytest.mark.parametrize(
    ("codec", "reasons"),
    [
        ("threshold", MASKED),
        ("int8", [INT8, INT8]),
        ("int4", ["int4 rows with stochastic rounding"] * 2),
        ("bfloat16", ["bfloat16 on the wire"] * 2),
        ("dense", ["activation_codec='dense'", "its forward is dense: activation_codec='dense'"]),
    ],
)
@pytest.mark.parametrize("rectify", [torch.relu, torch.tanh])
def test_option_holds_for_all_activations(codec: str, reasons: list[str], rectify: Callable[[Tensor], Tensor]) -> None:
    assert by_default(lambda x: exchange(rectify(x)).sin(), leaf(16, 64), activation_codec=codec).reasons == reasons


def test_option_leaves_embeddings_alone() -> None:
    table = nn.Embedding(8, 64)
    ids = torch.randint(0, 8, (16,))
    assert by_default(lambda index: exchange(table(index)).sin(), ids, activation_codec="dense").reasons == [INT8, INT8]
    by_pattern = by_default(lambda index: exchange(table(index)).sin(), ids, activation_codec={"small_models.py:*": "int4"})
    assert set(by_pattern.reasons) == {"int4 rows with stochastic rounding"}


class Net(nn.Module):
    """Exchanges of ``first`` and ``second``, in the same line."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mixer(), Mixer()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


class Mixer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return exchange(x.tanh()).sin()


@pytest.mark.parametrize("pattern", ["second", "sec*", "second: small_models.py:*"])
def test_first_pattern_that_matches_counts(pattern: str) -> None:
    traced = by_default(Net(), leaf(16, 64), activation_codec={pattern: "bfloat16", "*": "int4"})
    first, second = "int4 rows with stochastic rounding", "bfloat16 on the wire"
    assert traced.reasons == [first, second, second, first]


def test_what_no_pattern_matches_has_the_default() -> None:
    assert by_default(Net(), leaf(16, 64), activation_codec={"second": "dense"}).reasons[0] == INT8


def test_density_of_one_leaves_activations_dense_unless_a_codec_is_named() -> None:
    for rectify in (torch.relu, torch.tanh):
        traced = by_default(lambda x, rectify=rectify: exchange(rectify(x)).sin(), leaf(16, 64), mp_density=1)
        assert traced.reasons[0] == "mp_density=1 keeps everything"
    assert by_default(lambda x: exchange(x.tanh()).sin(), leaf(16, 64), mp_density=1, activation_codec="int8").reasons == [INT8, INT8]


def test_returned_results_are_allowed_to_lose_their_last_bits() -> None:
    assert set(by_default(lambda x: gather(x.tanh()), leaf(16, 64), mp_outputs=True).reasons) == {"bfloat16 on the wire"}


def test_gradient_without_a_forward_exchange_is_quantised() -> None:
    """As the backward of a column-parallel layer, of which nothing travels forward."""
    weight = torch.randn(64, 64)

    def layer(x: Tensor) -> Tensor:
        return (ColumnParallel.apply(x.sin()) @ weight).relu()

    assert by_default(layer, leaf(16, 64)).reasons == ["int8 rows with stochastic rounding, added up by owners of shares"]
    assert by_default(layer, leaf(16, 64), ranks=2).reasons == [INT8]
    assert by_default(layer, leaf(16, 64), exempt=["*"]).reasons == ["exempt by pattern '*'"]
    masked = by_default(layer, leaf(16, 64), activation_codec="threshold").reasons
    assert masked == ["no forward collective has this one as its backward, so there is no mask to reuse"]


class ScaledExchange(torch.autograd.Function):
    """An exchange with arithmetic around the one of its backward, by which they cannot be told to belong together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return exchange(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return exchange(gradient * 2) * 2


def test_no_threshold_where_the_gradient_may_travel_unmasked() -> None:
    def scaled(x: Tensor) -> Tensor:
        received: Tensor = ScaledExchange.apply(x.relu())  # type: ignore[no-untyped-call]
        return received.sin()

    assert by_default(scaled, leaf(16, 64)).reasons == [INT8, INT8]
    asked = by_default(scaled, leaf(16, 64), activation_codec="threshold").reasons
    assert asked[0] == "the gradient of its input could not be found, so it could not be masked"


def test_threshold_of_what_has_no_gradient() -> None:
    def target(x: Tensor) -> Tensor:
        with torch.no_grad():
            received = exchange(x.relu())
        return x.sin() * received.tanh()

    assert by_default(target, leaf(16, 64)).reasons == [MASKED[0]]


def test_dynamic_sequence_is_quantised() -> None:
    x = leaf(16, 8, 64)
    torch._dynamo.mark_dynamic(x, 1)
    traced = by_default(lambda x: exchange(x.relu()).sin(), x)  # a mask needs static rows
    assert traced.reasons == [INT8, INT8]


@pytest.mark.parametrize(
    ("ranks", "scheme", "sent"),
    [
        (2, "quantized_rows", 16 * 66),
        (3, "quantized_sum", 2 * 2 * 18 * 66 // 3),  # 16 rows are padded to 18
        (4, "quantized_sum", 2 * 3 * 16 * 66 // 4),
        (16, "quantized_sum", 2 * 15 * 16 * 66 // 16),
    ],
)
def test_bytes_of_a_sum_do_not_grow_with_the_ranks(ranks: int, scheme: str, sent: int) -> None:
    decision = decide(make_site("all_reduce", origin="computed", ranks=ranks))
    assert (decision.scheme, decision.wire_bytes) == (scheme, sent)
    assert decision.dense_bytes > 3.5 * sent * (0.8 if ranks == 3 else 1)


def test_wide_rows_are_shared_in_blocks() -> None:
    """Five rows of 1024 are 40 blocks of 128: ten for each rank, and no block is empty."""
    decision = decide(make_site("all_reduce", (5, 1024), origin="computed", ranks=4))
    assert decision.wire_bytes == 2 * 3 * 40 * 130 // 4
    assert decide(make_site("all_reduce", (5, 1021), origin="computed", ranks=4)).wire_bytes == 2 * 3 * 8 * 1023 // 4  # a prime


def test_sum_of_statistics_stays_exact() -> None:
    for width in (1, 7):
        assert decide(make_site("all_reduce", (16, width), origin="computed")).scheme == "dense"
    assert decide(make_site("all_reduce", (16, 8), origin="computed")).scheme == "quantized_sum"
