"""``dct docs``: the pages of the documentation, which are installed beside the package."""

import difflib
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import click
from click.shell_completion import CompletionItem

_FIRST = "docs/index.md"


def folder() -> Path:
    """Returns the folder of the pages: that of a clone, else that of the installed package.

    Raises ``click.ClickException`` where there is none.
    """
    tree = Path(__file__).parents[2]
    if (tree / "pyproject.toml").is_file() and (tree / _FIRST).is_file():
        return tree / "docs"
    try:
        installed = [file for file in files("dct-compile") or () if file.as_posix().endswith(f"dct-compile/{_FIRST}")]
    except PackageNotFoundError:
        installed = []
    if not installed:
        raise click.ClickException("the pages are not installed: install the package from its wheel, or take the folder docs of a clone")
    return Path(str(installed[0].locate())).resolve().parent


def pages() -> dict[str, Path]:
    """Returns the pages by name, such as ``troubleshooting`` and ``howto/fsdp``."""
    base = folder()
    return {path.relative_to(base).with_suffix("").as_posix(): path for path in sorted(base.rglob("*.md"))}


def complete_page(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Lets the shell complete the name of a page."""
    return [CompletionItem(name) for name in pages() if name.startswith(incomplete)]


@click.command()
@click.argument("page", required=False, shell_complete=complete_page)
def docs(page: str | None) -> None:
    """Print a page of the documentation, or list all of them.

    PAGE is a name of that list, such as troubleshooting or howto/fsdp. The pages are Markdown.
    """
    known = pages()
    if page is None:
        width = max(map(len, known))
        titles = {name: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for name, path in known.items()}
        click.echo("\n".join([f"Pages in {folder()}:", *(f"  {name:<{width}}  {title}" for name, title in titles.items())]))
        return
    name = page.removesuffix(".md").removeprefix("docs/")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise click.UsageError(f"there is no page {page!r}{f': did you mean {near[0]!r}?' if near else '; `dct docs` lists them'}")
    click.echo_via_pager(known[name].read_text(encoding="utf-8").removesuffix("\n"))
