"""Which tests need which version of torch."""

import pytest
import torch


def needs_torch(version: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test on versions of torch before ``version``. docs/versions.md has a row for each reason."""
    return pytest.mark.skipif(torch.__version__ < version, reason=f"torch {torch.__version__}: {reason}")
