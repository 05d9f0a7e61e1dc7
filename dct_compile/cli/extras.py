"""The packages that only some commands need."""

from importlib.util import find_spec

import click


def require(*packages: str) -> None:
    """Raises ``click.ClickException`` that names those of the extra "demo" that are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise click.ClickException(f"{', '.join(missing)} not installed: pip install 'dct-compile[demo]'")
