"""The version of this package."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """Returns the version of the installed package, "not installed" in a source tree that is used as it is."""
    try:
        return version("dct-compile")
    except PackageNotFoundError:
        return "not installed"
