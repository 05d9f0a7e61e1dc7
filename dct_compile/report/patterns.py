"""Patterns of options that match nothing, such as misspelt ones."""

import fnmatch
from collections.abc import Collection, Iterable, Sequence

from dct_compile.config import DCTConfig
from dct_compile.reasons import Note
from dct_compile.report.data import SiteReport

_OF_GRADIENTS = "parameter_densities"
"""The option whose patterns match parameters alone."""
_OF_ROWS = "activation_codec"
"""The option whose patterns match activations and embeddings alone."""


class Patterns:
    """Remembers which patterns of ``parameter_densities``, ``exempt`` and ``activation_codec`` have matched something.

    A pattern that matches in one of several models or graphs counts as matched: models may share their options.
    """

    def __init__(self) -> None:
        self._matched: dict[tuple[str, str], bool] = {}

    def look(self, config: DCTConfig, parameters: Iterable[str] = (), rows: Collection[str] = ()) -> None:
        """Looks for what the patterns of ``config`` match.

        Args:
            config: The options.
            parameters: The names of parameters, whether they are compressed or not.
            rows: The patterns that match activations or embeddings.
        """
        names = list(parameters)
        given = [(_OF_GRADIENTS, pattern) for pattern, _ in config.parameter_densities]
        given += [("exempt", pattern) for pattern in config.exempt]
        given += [(_OF_ROWS, pattern) for pattern in config.codec_patterns]
        for option, pattern in given:
            matches_row = option != _OF_GRADIENTS and pattern in rows
            matches_name = option != _OF_ROWS and any(fnmatch.fnmatchcase(name, pattern) for name in names)
            self._matched[option, pattern] = self._matched.get((option, pattern), False) or matches_row or matches_name

    def notes(self, sites: Sequence[SiteReport]) -> list[str]:
        """Returns a note for each option with patterns that match nothing. Without a site that an option is about, it is not known yet."""
        unmatched: dict[str, list[str]] = {}
        for (option, pattern), matched in list(self._matched.items()):  # another thread may add to it
            if not matched and any(option != _OF_GRADIENTS or site.kind == "gradient" for site in sites):
                unmatched.setdefault(option, []).append(repr(pattern))
        return [Note.UNMATCHED.format(option=option, patterns=", ".join(patterns)) for option, patterns in unmatched.items()]

    def clear(self) -> None:
        """Forgets all."""
        self._matched.clear()
