"""``dct train``: the demo. The same model trained dense and with DCT, and a report that compares the two."""

from pathlib import Path
from typing import Any

import click

from dct_compile.cli.extras import require
from dct_compile.cli.settings import BACKENDS, MODELS, Settings, parse_options, parse_value
from dct_compile.models.datasets import DATASETS

_POSITIVE = click.IntRange(min=1)
_DEFAULT = "Default: the backend's."


@click.command(context_settings={"show_default": True})
@click.option("--model", type=click.Choice(MODELS), default="dlrm", help="What to train.")
@click.option("--dataset", type=click.Choice(DATASETS), default="movielens", help="What to train it on.")
@click.option("--criteo-path", type=click.Path(path_type=Path), help="Criteo Kaggle's train.txt, for --dataset criteo.")
@click.option("--max-samples", type=click.IntRange(min=10), help="Use the first samples of the data set only.")
@click.option("--dp", type=_POSITIVE, default=2, help="Data-parallel ranks.")
@click.option("--mp", type=_POSITIVE, default=2, help="Model-parallel ranks of each data-parallel rank.")
@click.option("--backend", type=click.Choice([*BACKENDS, "both"]), default="both", help="dense: Inductor alone.")
@click.option("--dp-density", type=float, help=f"Fraction of a gradient that is sent. {_DEFAULT}")
@click.option("--mp-density", type=float, help=f"Fraction of an activation's row that is sent. {_DEFAULT}")
@click.option("--embedding-codec", help=f"int8, int4, threshold or dense. {_DEFAULT}")
@click.option("--threshold", help=f"exact, sampled, laplace, or a fixed value. {_DEFAULT}")
@click.option("--refresh-interval", type=int, help=f"Steps between two choices of a threshold. {_DEFAULT}")
@click.option("--refresh-warmup", help=f"geometric or off. {_DEFAULT}")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Any other option of the dct backend; repeatable.")
@click.option("--seeds", type=_POSITIVE, default=3, help="Runs per backend; each has its own split, initialisation and order.")
@click.option("--epochs", type=_POSITIVE, default=2)
@click.option("--batch-size", type=_POSITIVE, default=256, help="Samples per step, over all ranks.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=0.02, help="Adagrad's learning rate.")
@click.option("--check-every", type=_POSITIVE, default=1, help="Steps between two comparisons of the replicas.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/train"), help="Folder for the report.")
def train(
    backend: str,
    options: tuple[str, ...],
    threshold: str | None,
    dp_density: float | None,
    mp_density: float | None,
    embedding_codec: str | None,
    refresh_interval: int | None,
    refresh_warmup: str | None,
    **rest: Any,
) -> None:
    """Train a model dense and with DCT, on a mesh of data-parallel x model-parallel processes of this machine (gloo), and compare.

    Both start from the same parameters and see the same batches. Prints quality, bytes and speed, and writes metrics.json, plots and
    report.html to --out. Under torchrun, the ranks are those that torchrun started.
    """
    require("tqdm", "matplotlib")
    flags = {
        "dp_density": dp_density,
        "mp_density": mp_density,
        "embedding_codec": embedding_codec,
        "threshold": None if threshold is None else parse_value(threshold),
        "refresh_interval": refresh_interval,
        "refresh_warmup": refresh_warmup,
    }
    flags = {key: value for key, value in flags.items() if value is not None}
    try:
        more = parse_options(options)
        twice = flags.keys() & more.keys()
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))} given both as a flag and as an --option")
        settings = Settings(backends=BACKENDS if backend == "both" else (backend,), options={**flags, **more}, **rest)
        settings.check()
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"cannot write to {settings.out}: {error}") from error
    # Late, so that `dct --help` and usage errors do not wait for it.
    from dct_compile.cli.launch import launch

    launch(settings)
