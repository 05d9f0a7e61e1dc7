"""The public face and the command line import torch when they need it, and not before."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import dct_compile
from dct_compile.cli.lazy import LazyGroup
from dct_compile.cli.main import bench, main
from tests.processes import ROOT, run_python

RUN = "import sys; from dct_compile.cli.main import main; main(sys.argv[1:], prog_name='dct', standalone_mode=False); "
NO_TORCH = "assert 'torch' not in sys.modules, 'torch is imported'"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["bench", "--help"],
        ["advise", "--help"],
        ["inspect", "--help"],
        ["link", "--help"],
    ],
    ids=" ".join,
)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    assert "Usage: dct" in run_python(RUN + NO_TORCH, *arguments).stdout


def test_names_are_completed_without_torch() -> None:
    environment = {"_DCT_COMPLETE": "bash_complete", "COMP_WORDS": "dct in", "COMP_CWORD": "1"}
    code = f"import sys; from dct_compile.cli.main import main\ntry: main(prog_name='dct')\nfinally: {NO_TORCH}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("plain,inspect\n", "")


@pytest.mark.parametrize("group", [main, bench], ids=["dct", "dct bench"])
def test_lists_say_what_the_commands_say(group: LazyGroup) -> None:
    """The first sentence of each command's help stands in the group, too."""
    context = click.Context(group)
    for name, listed in group.commands.items():
        _, command, _ = group.resolve_command(context, [name])
        assert command is not None
        assert command.name == name
        assert str(command.help).replace("\n", " ").startswith(str(listed.help)), name
        assert str(listed.help).endswith(".")


def test_import_of_the_face_does_not_import_torch() -> None:
    run_python(f"import sys, dct_compile; {NO_TORCH}; assert 'report' in dir(dct_compile); {NO_TORCH}")


def test_every_public_name_is_there_first() -> None:
    """In a new process, each name by itself: nothing has to be imported before it."""
    code = "import dct_compile\nfor name in dct_compile.__all__: assert getattr(dct_compile, name).__name__ == name, name"
    run_python(code)


@pytest.mark.parametrize("name", ["audit", "monitor", "report"])
def test_modules_do_not_hide_functions_of_their_names(name: str) -> None:
    """The import of a submodule binds its name in the package."""
    run_python(
        f"import dct_compile, importlib; module = importlib.import_module('dct_compile.{name}')\n"
        f"assert callable(dct_compile.{name}) and dct_compile.{name} is not module\n"
        f"from dct_compile import {name}\nassert {name} is dct_compile.{name}\n"
        f"import dct_compile.backend\nassert dct_compile.{name} is {name}"
    )


def test_modules_are_attributes() -> None:
    run_python("import dct_compile; dct_compile.optim.register_first_moment; dct_compile.ops.pack_rows")


def test_unknown_names_are_attribute_errors() -> None:
    face: Any = dct_compile
    with pytest.raises(AttributeError, match="module 'dct_compile' has no attribute 'state_dicts'"):
        _ = face.state_dicts


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(dct_compile.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(alias.name, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {name for name, _ in seen} == set(dct_compile.__all__)
    for name, module in seen:
        assert getattr(dct_compile, name) is getattr(importlib.import_module(str(module)), name)
        assert dct_compile._HOME[name] == module
