"""Entry point of the command ``dct``."""

import click

from dct_compile.cli.lazy import LazyGroup


def _print_version(ctx: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if not is_asked or ctx.resilient_parsing:
        return
    from dct_compile.version import own_version  # late: every other command does without the metadata of packages

    click.echo(f"dct-compile {own_version()}")
    ctx.exit()


main = LazyGroup(
    "dct",
    {
        "advise": (
            "dct_compile.cli.advise",
            "Predict the step time of a model dense, with torch's fp16 hook and with DCT, and say which options to set.",
        ),
        "docs": ("dct_compile.cli.docs", "Print a page of the documentation, or list all of them."),
        "env": (
            "dct_compile.cli.env",
            "Print versions, compiler, kernels, GPUs and settings of this machine, for a report about a fault.",
        ),
        "inspect": ("dct_compile.cli.inspect", "Show every collective of a model, forward and backward, and what would become of it."),
        "link": (
            "dct_compile.cli.link",
            "Measure the link between the ranks that this command is started on, and print the option that says it.",
        ),
        "options": ("dct_compile.cli.options", "Print every option of the backend with its default, the allowed values and its meaning."),
        "train": (
            "dct_compile.cli.train",
            "Train a model dense and with DCT, on a mesh of data-parallel x model-parallel processes of this machine (gloo), and compare.",
        ),
        "tune": (
            "dct_compile.cli.tune",
            "Search for the options with the fewest seconds per step at a loss close to that of dense training.",
        ),
    },
    help="Dynamic Communication Thresholding for torch.compile.",
    params=[
        click.Option(
            ["--version"], is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version and exit."
        )
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
bench = LazyGroup(
    "bench",
    {
        "accuracy": ("dct_compile.cli.accuracy", "Train models whose activations are compressed where parallelisms would send them."),
        "kernels": (
            "dct_compile.cli.bench",
            "Time every op of torch.ops.dct beside a copy, torch.add and the same work in ordinary PyTorch ops.",
        ),
    },
    help="Measure what compression costs on this machine.",
)
main.add_command(bench)
