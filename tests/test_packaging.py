"""The tree is installed as it is, once, and under `dct_compile` only."""

import configparser
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch._dynamo

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("models", "passes", "triton_kernels")
FOLDERS = {"dct_compile": ROOT / "dct_compile", **{f"dct_compile.{name}": ROOT / name for name in LINKED}}
NOT_SHIPPED = {"ruff.toml"}
BESIDE = (".ci", ".github", "benchmarks", "docs", "examples", "tests")
"""Folders that the source distribution holds whole."""
ALONE = ("CITATION.cff", "LICENSE", "MANIFEST.in", "Makefile", "constraints.txt", "pyproject.toml", "setup.py")
"""Files of the top folder that it holds, beside all pages (``*.md``)."""


def files_of_tree() -> set[str]:
    """Returns the paths that a wheel must hold, as the wheel spells them."""
    found = set()
    for package, folder in FOLDERS.items():
        for here, folders, files in os.walk(folder, followlinks=False):
            folders[:] = [name for name in folders if name != "__pycache__" and name[0] != "." and not Path(here, name).is_symlink()]
            place = Path(*package.split("."), Path(here).relative_to(folder))
            found |= {(place / name).as_posix() for name in files if name not in NOT_SHIPPED and not name.startswith(".")}
    return found


def build(what: str, source: Path, target: Path) -> Path:
    """Runs one hook of the build backend in `source` and returns the file it made."""
    code = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    command = [sys.executable, "-c", code, f"build_{what}", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies the sources: building leaves files behind in the folder it runs in."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("dct_compile", *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in BESIDE:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*(ROOT / name for name in ALONE), *ROOT.glob("*.md")):
        shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def unpacked(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacks the source distribution of the tree."""
    target = tmp_path_factory.mktemp("sdist")
    shutil.unpack_archive(build("sdist", tree, target), target)
    (source,) = (path for path in target.iterdir() if path.is_dir())
    return source


@pytest.fixture(scope="module", params=["tree", "sdist"])
def wheel(request: pytest.FixtureRequest, tree: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds a wheel from the tree, and one from the source distribution of the tree."""
    return build("wheel", tree if request.param == "tree" else unpacked, tmp_path_factory.mktemp("dist"))


def test_links_lead_to_the_folders() -> None:
    for name in LINKED:
        assert os.readlink(ROOT / "dct_compile" / name) == f"../{name}"


def test_every_folder_is_a_listed_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {os.path.dirname(path).replace("/", ".") for path in files_of_tree()}
    assert sorted(listed) == sorted(folders)


def test_source_distribution_holds_what_its_tests_need(tree: Path, unpacked: Path) -> None:
    def files(root: Path) -> set[str]:
        folders = [root / name for name in (*BESIDE, "dct_compile", *LINKED)]
        found = {path for folder in folders for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
        return {path.relative_to(root).as_posix() for path in {*found, *(path for path in root.iterdir() if path.is_file())}}

    made = {"PKG-INFO", "setup.cfg"}
    assert files(tree) == files(unpacked) - made
    assert all(os.readlink(unpacked / "dct_compile" / name) == f"../{name}" for name in LINKED)


def test_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    packaged = {name for name in names if ".dist-info/" not in name and ".data/" not in name}
    tree_files = files_of_tree()
    assert sorted(packaged - tree_files) == []
    assert sorted(tree_files - packaged) == []
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"dct_compile"}


def test_pages_are_beside_the_installed_package(wheel: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--ignore-installed"]
    subprocess.run([*pip, "--prefix", str(tmp_path), str(wheel)], check=True, capture_output=True, cwd=tmp_path)
    (command,) = tmp_path.rglob("dct_compile/cli/docs.py")
    code = "import sys; from dct_compile.cli.main import main; main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(command.parents[2])}

    def said(*arguments: str) -> str:
        run = [sys.executable, "-c", code, "docs", *arguments]
        return subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    for page in ("troubleshooting", "howto/fsdp"):
        assert said(page) == (ROOT / "docs" / f"{page}.md").read_text()
    first, *lines = said().splitlines()
    place = Path(first.removeprefix("Pages in ").removesuffix(":"))
    assert place.is_relative_to(tmp_path.resolve())
    assert {line.split()[0] for line in lines} == {
        path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")
    }
    kept = {path.relative_to(ROOT) for path in (*ROOT.glob("examples/*.py"), *ROOT.glob("docs/images/*.svg"))}
    missing = [path for path in (Path("README.md"), Path("docs/train.py"), *kept) if not (place.parent / path).is_file()]
    assert missing == []


def test_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(name).decode())
    groups = {group: dict(parser[group]) for group in parser.sections()}
    assert groups == {
        "console_scripts": {"dct": "dct_compile.cli.main:main"},
        "torch_dynamo_backends": {"dct": "dct_compile.backend:dct"},
    }
    for target in (group["dct"] for group in groups.values()):
        module, _, attribute = target.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))


def test_torch_lists_the_backend() -> None:
    try:
        importlib.metadata.distribution("dct-compile")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dct-compile is not installed")
    assert "dct" in torch._dynamo.list_backends()


IMPORT_ALL = f"""
import importlib, pathlib, pkgutil, sys
import dct_compile
for found in pkgutil.walk_packages(dct_compile.__path__, "dct_compile."):
    if found.name.endswith(".__main__"):
        continue
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:  # an optional dependency that is not installed
        if (error.name or "").partition(".")[0] in ("dct_compile", *{LINKED!r}):
            raise
seen = {{}}
root = pathlib.Path(sys.argv[1]).resolve()
for name, module in list(sys.modules.items()):
    path = pathlib.Path(getattr(module, "__file__", None) or "/").resolve()
    if path.is_relative_to(root) and "site-packages" not in path.parts:
        assert name.partition(".")[0] == "dct_compile", name
        assert seen.setdefault(path, name) == name, (path, name, seen[path])
assert "dct_compile.triton_kernels" in seen.values(), seen
"""


@pytest.fixture(scope="module")
def imported(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Imports every module in a process of its own, from the tree and from an unpacked wheel."""
    folder = tmp_path_factory.mktemp("imported")
    zipfile.ZipFile(build("wheel", tree, folder)).extractall(folder / "site")
    places = {"tree": ROOT, "wheel": folder / "site"}

    def run(root: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", IMPORT_ALL, str(root)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor() as pool:  # each waits for a process of its own
        return dict(zip(places, pool.map(run, places.values()), strict=True))


@pytest.mark.parametrize("place", ["tree", "wheel"])
def test_each_module_is_imported_once_under_one_name(imported: dict[str, subprocess.CompletedProcess[str]], place: str) -> None:
    assert imported[place].returncode == 0, imported[place].stderr
