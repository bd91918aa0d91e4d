"""Libraries that are not there are a reason, not an error."""

from __future__ import annotations

import pytest
import torch

from nybble.kernels.bench.peers import library, require, require_room
from nybble.kernels.bench.workload import PeerMissingError


def test_a_library() -> None:
    assert library("math").sqrt(4) == 2
    with pytest.raises(PeerMissingError, match="no_such_library cannot be imported: No module named"):
        library("no_such_library.part")


def test_requirements() -> None:
    require(True, "never said")
    with pytest.raises(PeerMissingError, match="too old"):
        require(False, "too old")
    require_room(1 << 60, "a copy", torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_room_on_a_gpu() -> None:
    with pytest.raises(PeerMissingError, match="a copy, 1153 GB, does not fit"):
        require_room(1 << 50, "a copy", torch.device("cuda"))
