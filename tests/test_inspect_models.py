"""Every collective of every model is in the table."""

import inspect
import pkgutil
from collections import Counter
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx

import dct_compile
import dct_compile.models
from dct_compile.cli.targets import MODELS, Target
from dct_compile.inspection import fake_ranks
from dct_compile.models.recipes import RECIPES
from dct_compile.models.tasks import TASKS


def collectives_of(target: Target) -> Counter[str]:
    """What plain Inductor finds in the joint graphs before any pass, by name; none of this project's passes runs."""
    found: Counter[str] = Counter()

    def count(graph: fx.Graph) -> None:
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "_c10d_functional":
                found[node.target._schema.name.partition("::")[2]] += 1

    def zeros(gm: fx.GraphModule, _: Any, **__: Any) -> Any:
        results: Any = next(node for node in gm.graph.nodes if node.op == "output").args[0]
        values = [node.meta["val"] if isinstance(node, fx.Node) else node for node in results]
        return make_boxed_func(lambda *_: [torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v for v in values])

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        return compile_fx(gm, inputs, zeros, {"joint_custom_pre_pass": count})

    torch._dynamo.reset()
    torch.compile(target.model, backend=backend)(*target.inputs, **target.named_inputs)
    assert found.pop("wait_tensor", 0) >= found.total(), "every collective is waited for"
    return found


def test_every_model_can_be_inspected() -> None:
    """A module of models/ that holds a model of the module's own name is one; others hold parts and data."""
    named = set()
    for info in pkgutil.iter_modules(dct_compile.models.__path__):
        module = import_module(f"dct_compile.models.{info.name}")
        classes = [name for name, item in inspect.getmembers(module, inspect.isclass) if issubclass(item, nn.Module)]
        named |= {info.name} & {name.lower() for name in classes}
    assert named <= set(MODELS)
    assert named
    assert RECIPES.keys() == TASKS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"mp_density": 1, "embedding_codec": "dense", "dp_density": 1}])
def test_every_collective_is_in_the_table(name: str, options: dict[str, Any]) -> None:
    with fake_ranks(4):
        target = MODELS[name]()
        expected = collectives_of(target)
        report = dct_compile.explain(target.model, *target.inputs, options=options, **target.named_inputs)
        trained = {name.rpartition("module.")[2] for name, parameter in target.model.named_parameters() if parameter.requires_grad}  # type: ignore[attr-defined]
    in_graphs = [site for site in report.sites if report.graphs[site.graph].name.startswith("graph ")]
    assert (expected.total() > 0) == (name == "dlrm")  # of the others, only gradients and buffers travel, by DDP, outside of their graphs
    assert Counter(site.collective for site in in_graphs) == expected
    gradients = [site for site in report.sites if site.kind == "gradient"]
    if options:
        assert {site.decision for site in report.sites} == {"dense"}
        assert {site.name for site in gradients} == {"all of DDP's parameters"}
    else:
        assert sorted(name for site in gradients for name in site.name.split(", ")) == sorted(trained)
