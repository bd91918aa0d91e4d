"""Which backend is taken on which machine."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from nybble.engine import backend
from nybble.engine.backend import (
    Backend,
    make_ops,
    resolve_backend,
    resolve_cpu_threads,
    resolve_kv_cache_dtype,
    resolve_launch_table,
)
from nybble.engine.engine_config import CacheConfig, EngineConfig
from nybble.engine.errors import OptionError
from nybble.engine.hardware import Hardware
from nybble.kernels import nvfp4
from nybble.kernels.cpu.native_library import NativeLibrary, NativeLibraryError
from nybble.kernels.triton.launch import recorded_launches
from nybble.kernels.triton.launch_table import default_launch_table

CONFIG = EngineConfig(checkpoint="")
NATIVE = replace(CONFIG, backend="cpu", device="cpu")
CPU = Hardware("cpu", 1)
H100 = Hardware("cuda", 1, "H100", capability=90)
A100 = Hardware("cuda", 1, "A100", capability=80)
L40S = Hardware("cuda", 1, "L40S", capability=89)
V100 = Hardware("cuda", 1, "V100", capability=70)
BACKENDS: list[tuple[Backend, Hardware]] = [
    ("triton", H100),
    ("reference", H100),
    ("reference", A100),
    ("reference", CPU),
    ("cpu", CPU),
]


@pytest.mark.parametrize(("hardware", "expected"), [(CPU, "cpu"), (V100, "reference"), (H100, "triton")])
def test_auto(hardware: Hardware, expected: Backend) -> None:
    assert resolve_backend(CONFIG, hardware) == expected
    assert resolve_backend(replace(CONFIG, backend="reference"), hardware) == "reference"


def test_auto_in_bfloat16_on_a_host_is_the_reference() -> None:
    assert resolve_backend(replace(CONFIG, dtype="bfloat16"), CPU) == "reference"


def test_without_the_native_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once in the log if the choice was ours, and refused if it was asked for."""

    def missing() -> NativeLibrary:
        raise NativeLibraryError("it was not built: run this")

    monkeypatch.setattr(backend, "native_library", missing)
    with caplog.at_level(logging.INFO, "nybble.engine"):
        assert resolve_backend(CONFIG, CPU) == "reference"
    assert [record.message for record in caplog.records] == [
        "backend is 'reference', which is slower than 'cpu': it was not built: run this"
    ]
    with pytest.raises(OptionError, match="backend is 'cpu': it was not built: run this"):
        resolve_backend(NATIVE, CPU)


def test_the_native_backend_is_for_hosts_and_float32() -> None:
    with pytest.raises(OptionError, match="backend is 'cpu', but device is 'cuda': set device to 'cpu'"):
        resolve_backend(NATIVE, H100)
    with pytest.raises(OptionError, match="dtype is 'bfloat16', but backend 'cpu' computes in float32"):
        resolve_backend(replace(NATIVE, dtype="bfloat16"), CPU)


def test_threads_of_the_native_backend() -> None:
    hardware = replace(CPU, num_cores=6)
    assert resolve_cpu_threads(NATIVE, hardware) == 6
    assert resolve_cpu_threads(replace(NATIVE, cpu_threads=2), hardware) == 2
    assert resolve_cpu_threads(replace(CONFIG, backend="reference"), hardware) is None
    with pytest.raises(OptionError, match="cpu_threads is 0, expected 1 to 1024"):
        resolve_cpu_threads(replace(NATIVE, cpu_threads=0), hardware)
    with pytest.raises(OptionError, match="cpu_threads is 2, but backend is 'triton', not 'cpu'"):
        resolve_cpu_threads(replace(CONFIG, backend="triton", cpu_threads=2), H100)


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
def test_auto_cache(chosen: Backend, hardware: Hardware, is_declared: bool, expected: str) -> None:
    config = replace(CONFIG, backend=chosen, dtype="bfloat16")
    assert resolve_kv_cache_dtype(config, hardware, is_declared) == expected
    if expected != "fp8":
        wide = replace(config, dtype="float32")
        assert resolve_kv_cache_dtype(wide, hardware, is_declared) == "fp32"


@pytest.mark.parametrize("asked", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("is_declared", [False, True])
def test_a_cache_that_is_asked_for(asked: Literal["fp32", "bf16", "fp8"], is_declared: bool) -> None:
    cache = CacheConfig(kv_cache_dtype=asked)
    for chosen, hardware in BACKENDS:
        config = EngineConfig(checkpoint="", backend=chosen, dtype="bfloat16", cache=cache)
        assert resolve_kv_cache_dtype(config, hardware, is_declared) == asked


def test_native_code_keeps_its_cache_in_bfloat16() -> None:
    config = replace(NATIVE, dtype="float32")
    assert resolve_kv_cache_dtype(config, CPU, is_fp8_declared=True) == "bf16"


def test_an_fp8_cache_that_the_gpu_cannot_read_is_refused() -> None:
    cache = CacheConfig(kv_cache_dtype="fp8")
    config = EngineConfig(checkpoint="", backend="triton", dtype="bfloat16", cache=cache)
    for hardware, found in ((A100, "A100 has 8.0"), (L40S, "L40S has 8.9")):
        with pytest.raises(OptionError, match=f"compute capability 9.0 or more: {found}"):
            resolve_kv_cache_dtype(config, hardware, is_fp8_declared=True)


def write_table(path: Path, device: str, **fields: int) -> Path:
    entry = {"op": "fp4_linear", "arch": 90, "format": "nvfp4", "fields": fields or {"num_stages": 4}}
    entry["shape"] = {"tokens": 2, "rows": 64, "width": 512}
    table = {"schema": "nybble-launches/1", "device": device, "triton": "3.7.1", "launches": [entry]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table))
    return path


def chosen_stages(launch_table: str) -> int:
    """Of two tokens by a matrix that the tables of these tests are about."""
    config = replace(CONFIG, backend="triton", dtype="bfloat16", launch_table=launch_table)
    ops = make_ops(replace(config, launch_table=resolve_launch_table(config, H100)), H100)
    weight = ops.prepare_weight(nvfp4.quantize(torch.ones(64, 512)))
    x = torch.ones(2, 512, dtype=torch.bfloat16)
    with recorded_launches() as launches:
        ops.linear(x, weight)
    return int(launches[0].options["num_stages"])


def test_a_launch_table_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is named, and where --tune puts it; "none" and another GPU's leave the code's own choice."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    default = chosen_stages("auto")
    assert default != 4
    assert chosen_stages(str(write_table(tmp_path / "mine.json", "H100"))) == 4
    write_table(default_launch_table(), "A100")
    assert chosen_stages("auto") == default
    write_table(default_launch_table(), "H100")
    assert chosen_stages("auto") == 4
    assert chosen_stages("none") == default


def test_a_launch_table_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="measured on 'A100': this is 'H100'"):
        chosen_stages(str(write_table(tmp_path / "other.json", "A100")))
    with pytest.raises(OptionError, match=r"launch_table: .*fp4_linear has no speed"):
        chosen_stages(str(write_table(tmp_path / "wrong.json", "H100", speed=3)))
    with pytest.raises(OptionError, match=r"launch_table: .*No such file"):
        chosen_stages(str(tmp_path / "absent.json"))
