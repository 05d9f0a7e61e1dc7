"""The public face and the command line import torch when they need it, and not before."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
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


def _words(group: click.Group, *before: str) -> Iterator[list[str]]:
    """Yields the words of every command of a group, and of the groups in it."""
    for name, command in group.commands.items():
        yield [*before, name]
        if isinstance(command, click.Group):
            yield from _words(command, *before, name)


COMMANDS = list(_words(main))


@pytest.mark.parametrize("words", [[], *COMMANDS], ids=" ".join)
def test_help_does_not_import_torch(words: list[str]) -> None:
    said = run_python(RUN + NO_TORCH, *words, "--help").stdout
    assert said.startswith(" ".join(["Usage: dct", *words, "["]))


def test_every_command_is_tried() -> None:
    assert ["train"] in COMMANDS
    assert ["bench", "accuracy"] in COMMANDS
    assert len(COMMANDS) == len(main.commands) + len(bench.commands)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --lr 0", "--lr '0' is not of the form rate or backend=rate"),
        ("train --dp-density 2", "option 'dp_density' is 2.0 (float); allowed is a number in (0, 1]"),
        ("train --model gpt --dataset movielens", "gpt is not trained on movielens"),
        ("train --model gpt --mp 2", "gpt is trained data parallel only"),
        ("inspect gpt --options mp_density=2", "option 'mp_density' is 2 (int); allowed is a number in (0, 1]"),
        ("inspect dlmr", "unknown target 'dlmr': expected a model (dlrm, gpt, resnet) or file.py:function"),
        ("advise nowhere.py:one", "there is no file 'nowhere.py'"),
        ("bench kernels --op pack", "'pack' is not one of 'dequantize_rows'"),
        ("bench accuracy --rates 0.1,fast", "'fast' is not a number above 0"),
        ("bench accuracy --seeds 0", "0 is not in the range x>=1"),
    ],
)
def test_wrong_arguments_are_told_without_torch(arguments: str, message: str) -> None:
    code = "import sys; from dct_compile.cli.main import main\ntry: main(sys.argv[1:], prog_name='dct', standalone_mode=False)\n"
    caught = f"except Exception as error: print(error)\nelse: raise AssertionError('no error')\n{NO_TORCH}"
    assert message in run_python(code + caught, *arguments.split()).stdout


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("dct in", "plain,inspect\n"),
        ("dct train --backe", "plain,--backend\n"),
        ("dct train --model g", "plain,gpt\n"),
        ("dct bench kernels --op thr", "plain,threshold_pack\n"),
        ("dct bench accuracy --co", "plain,--codecs\n"),
    ],
)
def test_words_are_completed_without_torch(typed: str, completed: str) -> None:
    environment = {"_DCT_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    code = f"import sys; from dct_compile.cli.main import main\ntry: main(prog_name='dct')\nfinally: {NO_TORCH}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == (completed, "")


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


def test_modules_do_not_hide_functions_of_their_names() -> None:
    """The import of a submodule binds its name in the package."""
    run_python(
        "import dct_compile, importlib\n"
        "names = ('audit', 'monitor', 'report')\n"
        "modules = [importlib.import_module(f'dct_compile.{name}') for name in names]\n"
        "from dct_compile import audit, monitor, report\n"
        "assert all(map(callable, (audit, monitor, report))) and not {audit, monitor, report} & set(modules)\n"
        "import dct_compile.backend\n"
        "assert [getattr(dct_compile, name) for name in names] == [audit, monitor, report]"
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
