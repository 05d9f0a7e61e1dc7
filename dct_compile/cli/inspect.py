"""``dct inspect``: what the backend would do to a model, without running it."""

import shutil
import sys
from pathlib import Path

import click

from dct_compile.cli.asked import OPTIONS, asked_for, check_paths, complete_file, read, said, writing


@click.command(epilog=OPTIONS)
@click.argument("words", nargs=-1, required=True, metavar="TARGET", shell_complete=complete_file)
@click.option("--ranks", type=click.IntRange(min=1), default=4, show_default=True, help="Number of ranks to compile for.")
@click.option("--options", "options", multiple=True, metavar="KEY=VALUE...", help="Options of the dct backend; repeatable.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the page with graphs and drawings here.")
@click.option("--json", "json_", type=click.Path(path_type=Path, dir_okay=False), help="Write everything as JSON here.")
def inspect(words: tuple[str, ...], ranks: int, options: tuple[str, ...], html: Path | None, json_: Path | None) -> None:
    """Show every collective of a model, forward and backward, and what would become of it.

    TARGET is a model of this project (dlrm, gpt, resnet), or file.py:function, where the function takes no arguments and returns
    (model, inputs); inputs are a tensor, a tuple, or a dict by argument name. It is called as rank 0 of --ranks ranks: it can make process
    groups and wrap the model in DDP. Nothing is trained and nothing is sent; no data, GPU or other process is needed.
    """
    target, asked = asked_for(words, options)
    check_paths(html, json_)
    make, parsed = read(target, asked)
    # Late, so that `dct --help` and usage errors do not wait for it.
    from dct_compile.inspection import explain, fake_ranks

    with fake_ranks(ranks), said(target):
        found = make()
        report = explain(found.model, *found.inputs, options=parsed, **found.named_inputs)
    title = f"{target}, compiled for {ranks} rank{'s' if ranks > 1 else ''}"
    click.echo(f"{title}; bytes are sent per rank and call\n")
    click.echo(report.table(shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    if html is not None:
        with writing(html):
            report.to_html(html, title, {"options": ", ".join(asked) or "defaults"})
    if json_ is not None:
        with writing(json_):
            report.to_json(json_)
