"""Where in the user's code a node comes from."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import fx

_TORCH_FOLDER = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class SourceLine:
    """One line of the user's code: file, line number (from 1), the function it stands in and its text."""

    path: str
    line: int
    function: str
    code: str

    @property
    def place(self) -> str:
        """The full path of the file, and the line: ``/path/model.py:12``."""
        return f"{self.path}:{self.line}"

    def __str__(self) -> str:
        return f"{Path(self.path).name}:{self.line} in {self.function}: {self.code}"


def source_name(node: fx.Node) -> str:
    """Returns the user's line that issued ``node``, behind the path of its module: ``top.0: file.py:12 in forward: code``.

    The node's own name stands for a line that the trace does not hold.
    """
    path, line = module_path(node), source_line(node)
    text = str(line) if line is not None else node.name
    return f"{path}: {text}" if path else text


def module_path(node: fx.Node) -> str:
    """Returns the path of the module that issued ``node``, such as ``top.0``; empty for the outermost one."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0].partition("].")[2] if stack else ""


def source_line(node: fx.Node) -> SourceLine | None:
    """Returns the innermost line outside of torch that issued ``node``; ``None`` where the trace does not hold one."""
    return innermost_line(node.stack_trace) if node.stack_trace else None


@lru_cache(maxsize=1024)
def innermost_line(stack_trace: str) -> SourceLine | None:
    """Returns the last frame outside of torch of a formatted stack. Cached: all nodes of one module share their stack traces."""
    lines = stack_trace.splitlines()
    for position in range(len(lines) - 1, -1, -1):
        line = lines[position].strip()
        if line.startswith('File "') and _TORCH_FOLDER not in line:
            _, path, rest = line.split('"', 2)
            _, number, function = (part.strip() for part in rest.split(",", 2))
            code = lines[position + 1].strip() if position + 1 < len(lines) else ""
            return SourceLine(path, int(number.removeprefix("line ")), function.removeprefix("in "), code)
    return None
