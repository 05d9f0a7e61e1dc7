"""``dct tune``: searches for the options with which a training takes the fewest seconds per step at a loss close to that of dense."""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dct_compile.cli.asked import OPTIONS, asked_for, complete_file
from dct_compile.cli.extras import require
from dct_compile.cli.parsing import FiniteRange, check_options, parse_options
from dct_compile.link import Link, duration, parse

if TYPE_CHECKING:
    from dct_compile.cli.tune_search import Goal, Tried
    from dct_compile.cli.tune_trial import Trainable
    from dct_compile.tuning import Measured


@click.command(epilog=OPTIONS, context_settings={"show_default": True})
@click.argument("words", nargs=-1, required=True, metavar="TARGET", shell_complete=complete_file)
@click.option("--ranks", type=click.IntRange(min=2), default=2, help="Number of ranks of each training.")
@click.option("--trials", type=click.IntRange(min=1), default=20, help="Number of trials, those of earlier runs included.")
@click.option("--within", type=FiniteRange(min=0), default=0.01, help="Largest loss allowed, as a fraction above that of dense.")
@click.option("--link", default="1Gbit/s", help="The link that is assumed between the ranks. none: the time of a step as measured here.")
@click.option("--options", "options", multiple=True, metavar="KEY=VALUE...", help="Options that all trainings have; repeatable.")
@click.option("--search", multiple=True, metavar="KEY=VALUES", help="KEY=LOW..HIGH or KEY=A,B,...; repeatable. Default: by what travels.")
@click.option("--steps", type=click.IntRange(min=1), help="Length of a training of dlrm, gpt or resnet. Default: the model's own.")
@click.option("--timeout", type=FiniteRange(min=0, min_open=True), help="Seconds that a training may take. Default: no limit.")
@click.option("--by", type=click.Choice(["optuna", "ray"]), default="optuna", help="The library that searches.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the search.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/tune"), help="Folder for the study.")
def tune(words: tuple[str, ...], options: tuple[str, ...], by: str, out: Path, **given: Any) -> None:
    """Search for the options with the fewest seconds per step at a loss close to that of dense training.

    TARGET is dlrm, gpt or resnet, or file.py:function. The function is called on every rank with a dict of options, as torch.compile takes
    them. It trains and calls dct_compile.tuning.report(loss=..., step_seconds=...). Each training has processes of its own. A second run
    with the same arguments goes on with the study of the first one.
    """
    target, asked = asked_for(words, options)
    require("optuna" if by == "optuna" else "ray", extra="tune")
    require("matplotlib")
    link, fixed = _link(given["link"]), _fixed(asked, given["link"])
    # Late, so that `dct --help` and usage errors do not wait for it.
    from filelock import FileLock, Timeout

    from dct_compile.cli.tune_space import parse_space
    from dct_compile.cli.tune_trial import Trainable, checked

    trainable = checked(Trainable(target, given["ranks"], given["steps"], given["timeout"]), fixed)
    try:
        searched = parse_space(given["search"], fixed)
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / "lock", timeout=0).acquire()
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except Timeout:
        raise click.ClickException(f"another dct tune is at work in {out}") from None
    except OSError as error:
        raise click.UsageError(f"cannot write to {out}: {error}") from error
    with lock:
        _search(trainable, fixed, searched, link, by, out, given)


def _search(
    trainable: "Trainable", fixed: dict[str, Any], searched: dict[str, Any], link: Link | None, by: str, out: Path, given: dict[str, Any]
) -> None:
    from dct_compile.cli.tune_plots import draw
    from dct_compile.cli.tune_search import Goal, OptunaStudy, Tried, search_with_ray
    from dct_compile.cli.tune_space import space_for
    from dct_compile.cli.tune_trial import TrialError
    from dct_compile.options import DENSE

    def run(options: Mapping[str, Any], name: str) -> "Measured":
        return trainable.run({**fixed, **options}, out / "trials" / name)

    seconds = partial(step_seconds, link)
    click.echo(f"training {trainable.target} dense on {trainable.ranks} ranks, then {given['trials']} trials; study in {out}")
    try:
        if by == "optuna":
            study = OptunaStudy(out / "study.db", _name(trainable, fixed, searched, link), given["seed"])
            dense = study.dense(lambda: run(DENSE, "dense"))
        else:
            dense = run(DENSE, "dense")
    except TrialError as error:
        raise click.ClickException(f"the dense training failed: {error}") from error
    goal = Goal(dense.loss + given["within"] * abs(dense.loss), seconds)
    click.echo(f"dense: loss {dense.loss:.5g}, {duration(seconds(dense))} per step, {dense.wire_bytes:,.0f} bytes")
    space, tell = searched or space_for(dense.kinds, fixed), partial(_tell, seconds)
    if not space:
        raise click.ClickException("there is nothing to search: the dense training has no collective that could be compressed")
    if by == "optuna":
        tried = study.search(space, run, goal, given["trials"], tell)
    else:
        tried = search_with_ray(out, space, run, goal, given["trials"], tell)
    baseline = Tried({**DENSE}, dense, seconds(dense))
    _conclude(baseline, tried, goal, fixed)
    (out / "front.png").write_bytes(draw(trainable.target, baseline, tried, goal))
    click.echo(f"wrote {out / 'front.png'}")


def step_seconds(link: Link | None, measured: "Measured") -> float:
    """Returns the seconds of a step: those measured on this machine, and those that its messages take on the assumed link."""
    return measured.step_seconds + (link.seconds(measured.hops, measured.wire_bytes, 0) if link is not None else 0.0)


def _tell(seconds: Any, number: int, options: Mapping[str, Any], outcome: "Measured | str") -> None:
    said = (
        f"failed: {outcome}"
        if isinstance(outcome, str)
        else f"loss {outcome.loss:.5g}, {duration(seconds(outcome))} per step, {outcome.wire_bytes:,.0f} bytes"
    )
    click.echo(f"trial {number}: {said}; {_as_text(options)}")


def _conclude(dense: "Tried", tried: list["Tried"], goal: "Goal", fixed: dict[str, Any]) -> None:
    """Prints the front, and the options to paste."""
    from tabulate import tabulate

    from dct_compile.cli.tune_search import front

    if not tried:
        raise click.ClickException("every trial failed")
    rows = [
        [
            duration(trial.seconds),
            f"{trial.seconds / dense.seconds:.0%}",
            f"{trial.measured.loss:.5g}",
            f"{trial.measured.wire_bytes:,.0f}",
            "dense" if trial is dense else _as_text(trial.options),
        ]
        for trial in front([dense, *tried])
    ]
    headers = ["step", "of dense", "loss", "wire B", "options"]
    click.echo(f"\nnone is better in both step and loss:\n{tabulate(rows, headers, disable_numparse=True)}")
    best = goal.best([dense, *tried])
    if best is None or best is dense:
        click.echo(f"\nno trial is faster than dense at a loss of at most {goal.bound:.5g}: stay with dense")
        return
    click.echo(f"\nthe fewest seconds at a loss of at most {goal.bound:.5g}, {best.seconds / dense.seconds:.0%} of dense:")
    click.echo(f'torch.compile(model, backend="dct", options={ {**fixed, **best.options}!r})')


def _as_text(options: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in options.items())


def _name(trainable: "Trainable", fixed: dict[str, Any], searched: dict[str, Any], link: Link | None) -> str:
    """Names a study by all that its trials have in common: only these can be compared."""
    path = Path(trainable.target.rpartition(":")[0])
    code = path.read_text(encoding="utf-8") if path.is_file() else ""
    common = [trainable.target, trainable.ranks, trainable.steps, fixed, repr(searched), str(link), code]
    return f"{trainable.target} {hashlib.sha256(json.dumps(common).encode()).hexdigest()[:12]}"


def _link(text: str) -> Link | None:
    found = None if text.lower() == "none" else parse(text)
    if found is None and text.lower() != "none":
        raise click.UsageError(f"--link {text!r} is neither a rate such as 1Gbit/s or 100Mbit/s nor none")
    return found


def _fixed(asked: list[str], link: str) -> dict[str, Any]:
    """Returns the options of all trainings. Raises ``click.UsageError`` for what is not allowed."""
    try:
        parsed = parse_options(asked)
        check_options(parsed)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if "link" in parsed:
        raise click.UsageError("the link is said by --link, not by option link")
    return {"link": None if link.lower() == "none" else link, **parsed}
