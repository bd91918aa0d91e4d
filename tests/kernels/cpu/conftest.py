from __future__ import annotations

from collections.abc import Iterator

import pytest

from nybble.kernels.cpu.native_library import LEVELS, native_library
from nybble.kernels.cpu.pool import Pool


@pytest.fixture(params=LEVELS)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """Two threads, for each level that this machine has."""
    if request.param not in native_library().levels:
        pytest.skip(f"this machine has no {request.param}")
    with Pool(2, request.param) as pool:
        yield pool
