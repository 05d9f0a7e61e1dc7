"""``dct advise``: whether the backend would shorten a model's training steps, on a given link and number of ranks."""

import json
import os
from contextlib import ExitStack
from pathlib import Path

import click

from dct_compile.cli.asked import OPTIONS, asked_for, check_paths, complete_file, read, said, writing
from dct_compile.cli.extras import require
from dct_compile.cli.launched import rank_and_ranks
from dct_compile.cli.link import ranks_of_launcher
from dct_compile.cli.parsing import FiniteRange, parse_value
from dct_compile.link import Link, parse

_DEFAULT_LINK = "1Gbit/s"


@click.command(epilog=OPTIONS)
@click.argument("words", nargs=-1, required=True, metavar="TARGET", shell_complete=complete_file)
@click.option("--link", "link_text", metavar="RATE", help='"1Gbit/s" or {"bytes_per_s": ..., "latency_s": ...}. Default: 1Gbit/s.')
@click.option("--ranks", type=click.IntRange(min=2), help="Number of ranks. Default: 4; under torchrun those that there are.")
@click.option("--compute", type=FiniteRange(min=0, min_open=True), help="Seconds of forward and backward. Default: timed here.")
@click.option("--scale", is_flag=True, help="Show 2 to 1024 data-parallel ranks, by scheme.")
@click.option("--options", "options", multiple=True, metavar="KEY=VALUE...", help="Options of the dct backend; repeatable.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Write a picture (PNG) of step times here.")
@click.option("--json", "json_", type=click.Path(path_type=Path, dir_okay=False), help="Write all numbers as JSON here.")
def advise(
    words: tuple[str, ...],
    link_text: str | None,
    ranks: int | None,
    compute: float | None,
    scale: bool,
    options: tuple[str, ...],
    picture: Path | None,
    json_: Path | None,
) -> None:
    """Predict the step time of a model dense, with torch's fp16 hook and with DCT, and say which options to set.

    TARGET is as for `dct inspect`: dlrm, gpt, resnet, or file.py:function, which returns (model, inputs). Nothing is trained and nothing
    is sent. Without --compute, forward and backward are run a few times, for their time. Under torchrun the link is measured, unless
    --link says it.
    """
    target, asked = asked_for(words, options)
    check_paths(picture, json_)
    given = _link(link_text)
    launched = "RANK" in os.environ
    if launched and ranks not in (None, started := rank_and_ranks()[1]):
        raise click.UsageError(f"--ranks {ranks}, but torchrun has started {started} ranks: leave --ranks out")
    if picture is not None:
        require("matplotlib")
    make, parsed = read(target, asked)
    if "link" in parsed:
        raise click.UsageError("the link is said by --link, not by option link")
    # Late, so that `dct --help` and usage errors do not wait for it.
    from dct_compile.cli.advise_numbers import prepare, values
    from dct_compile.cli.advise_tables import tables
    from dct_compile.inspection import DEFAULT_RANKS, fake_ranks
    from dct_compile.runtime import RUNTIME

    with ExitStack() as stack:
        group = stack.enter_context(ranks_of_launcher() if launched else fake_ranks(ranks or DEFAULT_RANKS))
        measured = RUNTIME.links.of(group, "auto") if given is None and launched else None
        with said(target):
            case = prepare(make(), parsed, compute, measured or given or _default(), target, is_measured=measured is not None)
        if group.rank() != 0:
            return
        click.echo(tables(case, scale=scale))
        if json_ is not None:
            with writing(json_):
                json_.write_text(json.dumps(values(case), indent=1), encoding="utf-8")
        if picture is not None:
            # Late: matplotlib may be missing.
            from dct_compile.cli.advise_plots import draw

            drawn = draw(case)
            with writing(picture):
                picture.write_bytes(drawn)


def _default() -> Link:
    link = parse(_DEFAULT_LINK)
    assert link is not None
    return link


def _link(text: str | None) -> Link | None:
    if text is None:
        return None
    found = parse(parse_value(text))
    if found is None:
        raise click.UsageError(
            f"--link {text!r} is neither a rate such as 1Gbit/s or 100Mbit/s nor a mapping such as"
            ' {"bytes_per_s": 1.25e8, "latency_s": 5e-5} with numbers > 0'
        )
    return found
