"""Names of sites: where in the user's code a collective comes from."""

from torch import fx

from dct_compile.passes.source import source_name
from tests.small_models import gather, leaf
from tests.tracing import trace


def test_name_is_the_line_of_user_code() -> None:
    traced = trace(lambda x: gather(x.relu()) * 1, leaf(16, 64))
    names = [decision.site.name for decision in traced.decisions]
    assert names[0] == names[1]
    assert names[0].startswith("small_models.py:")
    assert "in gather: gathered: Tensor = funcol.all_gather_tensor_autograd(x, dim, world())" in names[0]


def test_name_without_a_stack_trace_is_the_nodes() -> None:
    assert source_name(fx.Graph().placeholder("received")) == "received"
