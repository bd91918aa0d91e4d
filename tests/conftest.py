"""Fixtures that several folders use."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.server.demo import prepare_demo

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo checkpoint where scripts/demo keeps it, prepared if it is not there."""
    directory = ROOT / "build" / "demo-checkpoint"
    directory.parent.mkdir(exist_ok=True)
    prepare_demo(directory, wheel=None)
    return directory
