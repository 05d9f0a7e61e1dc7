"""``dct options``: every option of the backend."""

import difflib
import re
import shutil

import click

from dct_compile.options import Option, described


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--markdown", is_flag=True, help="Print a table in Markdown, as in README.md.")
def options(names: tuple[str, ...], markdown: bool) -> None:
    """Print every option of the backend with its default, the allowed values and its meaning.

    With NAMEs, these alone. They are set by torch.compile(model, backend="dct", options={...}), and by --options of other commands.
    """
    known = {option.name: option for option in described()}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise click.UsageError(f"there is no option {name!r}{f': did you mean {near[0]!r}?' if near else ''}")
    chosen = [known[name] for name in names or known]
    click.echo(as_markdown(chosen) if markdown else "\n\n".join(map(_as_text, chosen)))


def as_markdown(chosen: list[Option]) -> str:
    """Returns options, defaults and meanings as a table."""
    rows = [f"| `{option.name}` | `{option.default}` | {option.meaning} |" for option in chosen]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


def _as_text(option: Option) -> str:
    """Returns an option for a terminal: code without its marks, and links as the places that they lead to."""
    meaning = re.sub(r"\[([^\]]*)\]\(([^)]*)\)", r"\2", option.meaning).replace("`", "")
    width = min(shutil.get_terminal_size().columns, 110)
    lines = [click.wrap_text(text, width, "  ", "  ") for text in (f"allowed: {option.allowed}", meaning)]
    return "\n".join([f"{option.name} = {option.default}", *lines])
