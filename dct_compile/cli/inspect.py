"""``dct inspect``: what the backend would do to a model, without running it."""

import logging
import os
import shutil
import sys
from pathlib import Path

import click

from dct_compile.cli.settings import parse_options
from dct_compile.config import default_options

_OPTIONS = "\b\nOptions of the backend and their defaults, for --options:\n" + "\n".join(
    f"  {name}={'[]' if value == () else value}" for name, value in default_options().items()
)


@click.command(epilog=_OPTIONS)
@click.argument("target")
@click.option("--ranks", type=click.IntRange(min=1), default=4, show_default=True, help="Number of ranks to compile for.")
@click.option("--options", "options", multiple=True, metavar="KEY=VALUE...", help="Options of the dct backend; repeatable.")
@click.argument("more", nargs=-1, metavar="")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the page with graphs and drawings here.")
@click.option("--json", "json_", type=click.Path(path_type=Path, dir_okay=False), help="Write everything as JSON here.")
def inspect(target: str, ranks: int, options: tuple[str, ...], more: tuple[str, ...], html: Path | None, json_: Path | None) -> None:
    """Show every collective of a model, forward and backward, and what would become of it.

    TARGET is a model of this project (dlrm, gpt, resnet), or file.py:function, where the function takes no arguments and returns
    (model, inputs); inputs are a tensor, a tuple, or a dict by argument name. It is called as rank 0 of --ranks ranks: it can make process
    groups and wrap the model in DDP. Nothing is trained and nothing is sent; no data, GPU or other process is needed.
    """
    if more and not options:
        raise click.UsageError(f"unexpected argument {more[0]!r}: options of the backend follow --options")
    for path in (html, json_):
        if path is not None and not path.resolve().parent.is_dir():
            raise click.UsageError(f"cannot write {path}: there is no folder {path.resolve().parent}")
    # Late, so that `dct --help` and usage errors do not wait for it.
    from torch._inductor import list_options
    from torch._logging._internal import set_logs

    from dct_compile.cli.targets import TargetError, find
    from dct_compile.config import split_options
    from dct_compile.inspection import explain, fake_ranks

    try:
        parsed = parse_options([*options, *more])
        split_options(parsed, list_options())
        make = find(target)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if "TORCH_LOGS" not in os.environ:
        set_logs(all=logging.CRITICAL)  # what torch logs on the way to an error is said by the error
    with fake_ranks(ranks):
        try:
            found = make()
        except TargetError as error:
            raise click.ClickException(str(error)) from error
        try:
            report = explain(found.model, *found.inputs, options=parsed, **found.named_inputs)
        except Exception as error:
            cause = getattr(error, "inner_exception", error)  # what torch says around a backend's error is of no help here
            raise click.ClickException(f"{target} could not be compiled: {type(cause).__name__}: {cause}") from error
    title = f"{target}, compiled for {ranks} rank{'s' if ranks > 1 else ''}"
    click.echo(f"{title}; bytes are sent per rank and call\n")
    click.echo(report.table(shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    if html is not None:
        report.to_html(html, ", ".join([title, *options, *more]))
        click.echo(f"wrote {html}")
    if json_ is not None:
        report.to_json(json_)
        click.echo(f"wrote {json_}")
