"""Every way a GLM checkpoint declares its quantization, and what a contradiction says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.layouts import (
    COMPRESSED_MXFP4,
    COMPRESSED_NVFP4,
    FP8_PER_CHANNEL,
    MODELOPT_NVFP4,
    QUARK_MXFP4,
)
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.quantization_config import (
    QuantizationConfig,
    check_quantization,
    read_quantization_config,
)
from nybble.engine.engine_config import CacheConfig, EngineConfig
from nybble.engine.errors import CheckpointError, ConfigError
from nybble.engine.loading import prepare

DATA = Path(__file__).parents[1] / "data"
EXPERT = "model.layers.7.mlp.experts.3.up_proj"
QUERY = "model.layers.7.self_attn.q_proj"


def _declare(directory: Path, fields: dict[str, Any] | None) -> QuantizationConfig | None:
    (directory / "config.json").write_text(json.dumps({"quantization_config": fields}))
    return read_quantization_config(directory)


def test_the_official_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DATA / "glm-4.7-nvfp4-config.json").read_text())
    declared = read_quantization_config(tmp_path)
    assert declared is not None
    assert declared.layouts == (MODELOPT_NVFP4,)
    assert declared.is_ignored(QUERY) and declared.is_ignored("lm_head")
    assert declared.is_ignored("model.layers.92.mlp.experts.0.up_proj")
    assert not declared.is_ignored(EXPERT)
    assert declared.has_fp8_kv_cache


def test_the_older_file_of_modelopt(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*self_attn*"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    declared = read_quantization_config(tmp_path)
    assert declared is not None
    assert (declared.method, declared.layouts) == ("modelopt", (MODELOPT_NVFP4,))
    assert declared.is_ignored(QUERY) and not declared.is_ignored(EXPERT)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, True),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}}, True),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "attn_head"}}, False),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, False),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, False),
        ({"kv_cache_scheme": None}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors"])
def test_the_kv_cache(tmp_path: Path, method: str, fields: dict[str, Any], expected: bool) -> None:
    kind = {"quant_algo": "NVFP4"} if method == "modelopt" else {"format": "nvfp4-pack-quantized"}
    declared = _declare(tmp_path, {"quant_method": method} | kind | fields)
    assert declared is not None and declared.has_fp8_kv_cache is expected


@pytest.mark.parametrize(("algorithm", "expected"), [("FP8", True), ("NVFP4", False), (None, False)])
def test_the_kv_cache_in_the_older_file(tmp_path: Path, algorithm: str | None, expected: bool) -> None:
    (tmp_path / "config.json").write_text("{}")
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": algorithm}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    declared = read_quantization_config(tmp_path)
    assert declared is not None and declared.has_fp8_kv_cache is expected


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("nvfp4-pack-quantized", COMPRESSED_NVFP4),
        ("mxfp4-pack-quantized", COMPRESSED_MXFP4),
        ("float-quantized", FP8_PER_CHANNEL),
    ],
)
def test_compressed_tensors(tmp_path: Path, kind: str, layout: object) -> None:
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.gate$"]
    declared = _declare(tmp_path, {"quant_method": "compressed-tensors", "format": kind, "ignore": ignore})
    assert declared is not None
    assert declared.layouts == (layout,)
    assert declared.is_ignored(QUERY) and declared.is_ignored("model.layers.5.mlp.gate")
    assert not declared.is_ignored("model.layers.0.mlp.gate_proj")


def test_quark(tmp_path: Path) -> None:
    weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    fields = {"quant_method": "quark", "global_quant_config": {"weight": weight}, "exclude": ["*self_attn*"]}
    declared = _declare(tmp_path, fields)
    assert declared is not None
    assert declared.layouts == (QUARK_MXFP4,)
    assert declared.is_ignored(QUERY) and not declared.is_ignored(EXPERT)


def test_no_declaration(tmp_path: Path) -> None:
    assert _declare(tmp_path, None) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "quant_method None is not one of modelopt, compressed-tensors, quark"),
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo 'FP8' is not one of NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": ["NVFP4"]}, "quant_algo"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format 'pack-quantized'"),
        ({"quant_method": "quark"}, "global_quant_config.weight"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": "lm_head"}, "ignore is 'lm_head'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [5]}, "ignore is"),
    ],
)
def test_unknown_declarations_are_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _declare(tmp_path, fields)


def test_a_bad_pattern_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'re:\(' is not a pattern"):
        QuantizationConfig("compressed-tensors", (), ("re:(",)).is_ignored("lm_head")


def test_the_demo_checkpoint_is_what_it_declares(demo_checkpoint: Path) -> None:
    declared = read_quantization_config(demo_checkpoint)
    assert declared is not None
    entries = Checkpoint.open(demo_checkpoint).entries
    config = ModelConfig.from_directory(demo_checkpoint)
    check_quantization(declared, config, entries)
    with pytest.raises(CheckpointError, match=r"experts\.0\.\w+\.weight': .* among what stays float"):
        check_quantization(
            QuantizationConfig("modelopt", (MODELOPT_NVFP4,), ("*.experts.*",)), config, entries
        )
    with pytest.raises(CheckpointError, match=r"is ModelOpt NVFP4, but .* declares Quark MXFP4"):
        check_quantization(QuantizationConfig("quark", (QUARK_MXFP4,), ()), config, entries)


def test_the_engine_checks_it_before_loading(demo_checkpoint: Path, tmp_path: Path) -> None:
    for path in demo_checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    fields = json.loads((demo_checkpoint / "config.json").read_text())
    fields["quantization_config"]["ignore"].append("*shared_experts*")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = EngineConfig(checkpoint=str(tmp_path), device="cpu", cache=CacheConfig(kv_cache_memory=0.5))
    with pytest.raises(CheckpointError, match=r"shared_experts.* among what stays float"):
        prepare(config)
