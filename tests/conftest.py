"""Fixtures that several folders use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before a kernel is imported: this decides what @triton.jit makes of it
    os.environ["TRITON_INTERPRET"] = "1"
    from triton_interpreter import repair

    repair()

    import fp4_assembly
    import fp8_assembly

    fp4_assembly.register()
    fp8_assembly.register()

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo checkpoint where scripts/demo keeps it, prepared if it is not there."""
    # Here, since it takes libraries that a machine for checking kernels may lack.
    from nybble.server.commands.demo import prepare_demo

    directory = ROOT / "build" / "demo-checkpoint"
    directory.parent.mkdir(exist_ok=True)
    prepare_demo(directory, wheel=None)
    return directory
