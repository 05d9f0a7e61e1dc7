"""Which tests need which version of torch."""

import pytest
import torch


def needs_torch(version: str, reason: str, *, but: str = "none") -> pytest.MarkDecorator:
    """Skips a test on versions of torch before ``version``, unless they begin with ``but``. docs/versions.md has a row for each reason."""
    installed = str(torch.__version__)
    return pytest.mark.skipif(torch.__version__ < version and not installed.startswith(but), reason=f"torch {installed}: {reason}")
