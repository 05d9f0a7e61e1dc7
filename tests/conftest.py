"""Set-up shared by all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this when a kernel is decorated, so it must be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are filled with NaN or the largest integer: whoever reads or leaves them fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
