"""Which backend is taken on which machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from nybble.engine import backend
from nybble.engine.backend import resolve_backend, resolve_kv_cache_dtype
from nybble.engine.engine_config import CacheConfig, EngineConfig
from nybble.engine.errors import OptionError
from nybble.engine.hardware import Hardware

CONFIG = EngineConfig(checkpoint="")
CPU = Hardware("cpu", 1)
H100 = Hardware("cuda", 1, "H100", capability=90)
A100 = Hardware("cuda", 1, "A100", capability=80)
L40S = Hardware("cuda", 1, "L40S", capability=89)
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


@pytest.mark.parametrize(
    ("chosen", "hardware", "is_declared", "expected"),
    [
        ("triton", H100, True, "fp8"),
        ("triton", H100, False, "bf16"),
        ("triton", A100, True, "bf16"),
        ("triton", L40S, True, "bf16"),
        ("reference", H100, True, "bf16"),
        ("reference", CPU, True, "bf16"),
    ],
)
def test_auto_cache(
    chosen: Literal["reference", "triton"], hardware: Hardware, is_declared: bool, expected: str
) -> None:
    config = replace(CONFIG, backend=chosen, dtype="bfloat16")
    assert resolve_kv_cache_dtype(config, hardware, is_declared) == expected
    if expected != "fp8":
        wide = replace(config, dtype="float32")
        assert resolve_kv_cache_dtype(wide, hardware, is_declared) == "fp32"


@pytest.mark.parametrize("asked", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("is_declared", [False, True])
def test_a_cache_that_is_asked_for(asked: Literal["fp32", "bf16", "fp8"], is_declared: bool) -> None:
    cache = CacheConfig(kv_cache_dtype=asked)
    for chosen, hardware in (("triton", H100), ("reference", H100), ("reference", A100), ("reference", CPU)):
        config = EngineConfig(checkpoint="", backend=chosen, dtype="bfloat16", cache=cache)
        assert resolve_kv_cache_dtype(config, hardware, is_declared) == asked


def test_an_fp8_cache_that_the_gpu_cannot_read_is_refused() -> None:
    cache = CacheConfig(kv_cache_dtype="fp8")
    config = EngineConfig(checkpoint="", backend="triton", dtype="bfloat16", cache=cache)
    for hardware, found in ((A100, "A100 has 8.0"), (L40S, "L40S has 8.9")):
        with pytest.raises(OptionError, match=f"compute capability 9.0 or more: {found}"):
            resolve_kv_cache_dtype(config, hardware, is_fp8_declared=True)
