"""Entry point of the command ``dct``."""

import click

from dct_compile.cli.accuracy import accuracy
from dct_compile.cli.advise import advise
from dct_compile.cli.bench import bench
from dct_compile.cli.inspect import inspect
from dct_compile.cli.link import link
from dct_compile.cli.train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Dynamic Communication Thresholding for torch.compile."""


main.add_command(advise)
bench.add_command(accuracy)
main.add_command(bench)
main.add_command(inspect)
main.add_command(link)
main.add_command(train)
