"""What the oldest supported torch cannot do (docs/versions.md), for the tests that need it."""

import pytest
import torch

SINCE_2_13 = torch.__version__ >= "2.13"
needs_2_13 = pytest.mark.skipif(not SINCE_2_13, reason="torch 2.12 cannot do this: docs/versions.md")
