"""Which backend is taken on which machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from nybble.engine import backend
from nybble.engine.backend import resolve_backend
from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import OptionError
from nybble.engine.hardware import Hardware

CONFIG = EngineConfig(checkpoint="")
CPU = Hardware("cpu", 1)
H100 = Hardware("cuda", 1, "H100", capability=90)
V100 = Hardware("cuda", 1, "V100", capability=70)


def triton_is(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(backend, "version", lambda name: found)


@pytest.mark.parametrize(
    ("hardware", "expected"), [(CPU, "reference"), (V100, "reference"), (H100, "triton")]
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch, hardware: Hardware, expected: Literal["reference", "triton"]
) -> None:
    triton_is(monkeypatch, "3.9.0")
    assert resolve_backend(CONFIG, hardware) == expected


@pytest.mark.parametrize(
    ("found", "is_right"), [("3.6.0", False), ("3.7.1", False), ("3.8.0", True), ("3.10.1", True)]
)
@pytest.mark.parametrize("asked", ["auto", "triton"])
def test_a_triton_that_compiles_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, asked: Literal["auto", "triton"], found: str, is_right: bool
) -> None:
    """Also where nobody asked for it by name: the reference would need several times the memory."""
    triton_is(monkeypatch, found)
    config = replace(CONFIG, backend=asked)
    if is_right:
        assert resolve_backend(config, H100) == "triton"
    else:
        with pytest.raises(OptionError, match=rf"needs triton 3.8 or newer, found {found}"):
            resolve_backend(config, H100)
    assert resolve_backend(replace(CONFIG, backend="reference"), H100) == "reference"


@pytest.mark.parametrize(("hardware", "found"), [(CPU, "there is none"), (V100, "V100 has 7.0")])
def test_triton_without_a_gpu_for_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, hardware: Hardware, found: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(OptionError, match=f"compute capability 8.0 or more: {found}"):
        resolve_backend(replace(CONFIG, backend="triton"), hardware)
