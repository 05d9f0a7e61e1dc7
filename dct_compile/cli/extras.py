"""The packages that only some commands need."""

from importlib.util import find_spec

import click


def require(*packages: str, extra: str = "demo") -> None:
    """Raises ``click.ClickException`` that names those of ``extra`` that are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise click.ClickException(f"{', '.join(missing)} not installed: pip install 'dct-compile[{extra}]'")
