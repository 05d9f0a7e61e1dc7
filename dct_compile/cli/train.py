"""``dct train``: the same model trained dense, with DCT and by torch's own hooks, and a report that compares them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dct_compile.cli.asked import make_folder
from dct_compile.cli.backends import BACKENDS, parse_backends
from dct_compile.cli.extras import require
from dct_compile.cli.parsing import FiniteRange, parse_options, parse_value
from dct_compile.cli.settings import ASSUMED_LINK, OWN_RATES, Settings, optimization_of, parse_rates
from dct_compile.models.optimization import OPTIMIZERS, SCHEDULES
from dct_compile.models.recipes import FASHION_MNIST, RECIPES, Recipe

_POSITIVE = click.IntRange(min=1)
_FRACTION = FiniteRange(min=0, max=1, max_open=True)
_DEFAULT = "Default: the backend's."
_DATASETS = tuple(name for recipe in RECIPES.values() for name in recipe.datasets)


def _by_model(text: str, value: Callable[[Recipe], Any]) -> str:
    """Returns the help ``text`` of an option, with the default of each model."""
    defaults = {name: value(recipe) for name, recipe in RECIPES.items()}
    if len(set(defaults.values())) == 1:
        return f"{text} Default: {defaults.popitem()[1]}."
    return f"{text} Default: {', '.join(f'{name} {default}' for name, default in defaults.items())}."


def _length(recipe: Recipe) -> str:
    return f"{recipe.steps} steps" if recipe.steps is not None else f"{recipe.epochs} epochs"


def _rates(recipe: Recipe) -> str:
    own = recipe.optimization
    model = next(name for name, other in RECIPES.items() if other is recipe)
    return ", ".join([str(own.lr), *(f"{backend}={rate}" for backend, rate in OWN_RATES.get((model, own.optimizer), {}).items())])


@click.command(context_settings={"show_default": True})
@click.option("--model", type=click.Choice(tuple(RECIPES)), default="dlrm", help="What to train.")
@click.option("--dataset", type=click.Choice(_DATASETS), help=_by_model("What to train it on.", lambda own: own.datasets[0]))
@click.option("--criteo-path", type=click.Path(path_type=Path), help="Criteo Kaggle's train.txt, for --dataset criteo.")
@click.option(
    "--fashion-mnist-path",
    type=click.Path(path_type=Path),
    help=f"Folder of its four files, for --dataset fashion-mnist. Default: {FASHION_MNIST}.",
)
@click.option("--max-samples", type=click.IntRange(min=10), help="Use the first samples of the data set only.")
@click.option("--dp", type=_POSITIVE, default=2, help="Data-parallel ranks.")
@click.option("--mp", type=_POSITIVE, help=_by_model("Model-parallel ranks of each data-parallel rank.", lambda own: own.mp or 1))
@click.option(
    "--backend",
    "backends",
    multiple=True,
    default=("both",),
    metavar="NAME,...",
    help=f"{', '.join(BACKENDS)}; several with commas or repeatedly; both: dense and dct. dense is Inductor alone; fp16 and powersgd are "
    "torch's own hooks for DDP.",
)
@click.option(
    "--link",
    default=ASSUMED_LINK,
    help="The link between the ranks that dct assumes. auto measures it: ranks of one machine then stay dense. none lets the bytes decide.",
)
@click.option("--dp-density", type=float, help=f"Fraction of a gradient that is sent. {_DEFAULT}")
@click.option("--mp-density", type=float, help=f"Fraction of an activation's row that is sent. {_DEFAULT}")
@click.option("--embedding-codec", help=f"int8, int4, threshold or dense. {_DEFAULT}")
@click.option("--threshold", help=f"exact, sampled, laplace, or a fixed value. {_DEFAULT}")
@click.option("--refresh-interval", type=int, help=f"Steps between two choices of a threshold. {_DEFAULT}")
@click.option("--refresh-warmup", help=f"geometric or off. {_DEFAULT}")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Any other option of the dct backend; repeatable.")
@click.option(
    "--seeds", type=_POSITIVE, help=_by_model("Runs per backend; each has its own initialisation and order.", lambda own: own.seeds)
)
@click.option("--epochs", type=_POSITIVE, help=_by_model("Length of a run.", _length))
@click.option("--steps", type=_POSITIVE, help="Length of a run in steps, in place of epochs.")
@click.option("--batch-size", type=_POSITIVE, help=_by_model("Samples per step, over all ranks.", lambda own: own.batch_size))
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help=_by_model("Optimizer.", lambda own: own.optimization.optimizer))
@click.option(
    "--lr",
    "rates",
    multiple=True,
    metavar="[NAME=]RATE",
    help=_by_model("Learning rate, of all backends or of one; repeatable.", _rates),
)
@click.option(
    "--warmup", type=click.IntRange(min=0), help=_by_model("Steps in which the learning rate rises.", lambda own: own.optimization.warmup)
)
@click.option(
    "--schedule",
    type=click.Choice(SCHEDULES),
    help=_by_model("The learning rate then stays, or falls to zero along half a cosine.", lambda own: own.optimization.schedule),
)
@click.option("--momentum", type=_FRACTION, help=_by_model("Of sgd.", lambda own: own.optimization.momentum))
@click.option("--beta1", type=_FRACTION, help=_by_model("Of adam and adamw.", lambda own: own.optimization.betas[0]))
@click.option("--beta2", type=_FRACTION, help=_by_model("Of adam and adamw.", lambda own: own.optimization.betas[1]))
@click.option("--check-every", type=_POSITIVE, default=1, help="Steps between two comparisons of the replicas.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/train"), help="Folder for the report.")
def train(**given: Any) -> None:
    """Train a model dense and with DCT, on a mesh of data-parallel x model-parallel processes of this machine (gloo), and compare.

    All start from the same parameters and see the same batches. Prints quality, bytes and speed, and writes metrics.json, plots and
    report.html to --out. Under torchrun, the ranks are those that torchrun started.
    """
    require("tqdm", "matplotlib")
    try:
        settings = _settings(given)
        settings.check()
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    make_folder(settings.out, "report.html")
    # Late, so that `dct --help` and usage errors do not wait for it.
    from dct_compile.cli.launch import launch

    launch(settings)


def _settings(given: dict[str, Any]) -> Settings:
    """Returns the settings: what was given, else the model's own. Raises ``ValueError`` for what cannot be read or does not fit."""
    recipe = RECIPES[given["model"]]
    lr, rates = parse_rates(given.pop("rates"))
    names = ("optimizer", "warmup", "schedule", "momentum", "beta1", "beta2")
    optimization = optimization_of(given["model"], lr=lr, **{name: given.pop(name) for name in names})
    if lr is None:
        rates = {**OWN_RATES.get((given["model"], optimization.optimizer), {}), **rates}
    backends, options = parse_backends(given.pop("backends")), _backend_options(given)
    own = {"dataset": recipe.datasets[0], "mp": recipe.mp or 1, "seeds": recipe.seeds, "batch_size": recipe.batch_size}
    if given["steps"] is not None:
        given["epochs"] = None
    elif given["epochs"] is None:
        own |= {"steps": recipe.steps, "epochs": recipe.epochs if recipe.steps is None else None}
    own = {name: value for name, value in own.items() if given[name] is None}
    return Settings(**{**given, **own}, backends=backends, options=options, optimization=optimization, rates=rates)


def _backend_options(given: dict[str, Any]) -> dict[str, Any]:
    """Takes the options of the dct backend out of ``given``, those with a flag of their own and the others."""
    names = ("link", "dp_density", "mp_density", "embedding_codec", "threshold", "refresh_interval", "refresh_warmup")
    flags = {name: value for name in names if (value := given.pop(name)) is not None}
    if flags["link"].lower() == "none":
        flags["link"] = None
    if "threshold" in flags:
        flags["threshold"] = parse_value(flags["threshold"])
    more = parse_options(given.pop("options"))
    twice = flags.keys() & more.keys()
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} given both as a flag and as an --option")
    return {**flags, **more}
