"""`from poison import poisoned as poisoned` in a test file fills its empty tensors with rubbish."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Empty tensors hold NaN, or the largest integer: an element that no kernel stores is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
