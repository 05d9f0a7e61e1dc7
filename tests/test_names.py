"""Names of parameters in the report: those of the model, wherever Dynamo found them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from dct_compile.compiler.inputs import describe_inputs, readable_source


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['top']._parameters['weight']", "top.weight"),
        ("L['self']._modules['blocks']._modules['0']._buffers['mean']", "blocks.0.mean"),
        ("L['self'].weight", "weight"),
        ("G['net']._modules['top']._parameters['weight']", "top.weight"),
        ("G['__import_a_dot_b'].net._parameters['weight']", "net.weight"),
        ("L['step'].__closure__[0].cell_contents._modules['top']._parameters['weight']", "top.weight"),
        ("L['self']._modules['scales']._parameters['x[0]']", "scales.x[0]"),
        ("L['self'].layers[1]._parameters['bias']", "layers.1.bias"),
        ("L['self'].heads['a.b']._parameters['bias']", "heads.a.b.bias"),
        ("L['self'].heads[\"it's\"]._parameters['bias']", "heads.it's.bias"),
        ("L['layers'][1]._parameters['bias']", "layers.1.bias"),
        ("L['x']", "L['x']"),
        ("L['___stack0']", "L['___stack0']"),
        ("list(L['d'].keys())[0]", "list(L['d'].keys())[0]"),
    ],
)
def test_a_source_is_a_path(source: str, name: str) -> None:
    assert readable_source(source) == name


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.scales = nn.ParameterDict({"x[0]": nn.Parameter(torch.ones(4))})
        self.hidden = [nn.Parameter(torch.ones(4))]

    def forward(self, x: torch.Tensor) -> Any:
        return self.blocks[0](self.normed(x)) * self.scales["x[0]"] * self.hidden[0]


def test_names_are_those_of_the_model() -> None:
    """What is no submodule has the name of its attribute."""
    found: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.extend(info.name for info in describe_inputs(gm, inputs, None) if info.is_parameter)
        return gm.forward

    model = Mixed()
    torch.compile(model, backend=backend)(torch.randn(2, 4))
    assert sorted(found) == sorted([*(name for name, _ in model.named_parameters()), "hidden.0"])
