from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from nybble.engine.checkpoint.checkpoint import TensorEntry
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.parameters import (
    Parameter,
    Shard,
    check_draft_tensors,
    check_tensors,
    draft_parameters,
    expected_parameters,
    is_draft,
)
from nybble.engine.errors import CheckpointError

GLM_4_7: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "glm-4.7-config.json").read_text())
TINY = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "eos_token_id": 0,
}
DOWN = "model.layers.0.mlp.down_proj.weight"  # [32, 48]
K_PROJ = "model.layers.1.self_attn.k_proj"


def _config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_fields(GLM_4_7 | TINY | changes)


def _entry(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> TensorEntry:
    return TensorEntry(name, Path("/checkpoint/shard-7.safetensors"), dtype, shape)


def _entries(config: ModelConfig) -> dict[str, TensorEntry]:
    """A complete checkpoint in BF16."""
    return {p.name: _entry(p.name, p.shape) for p in expected_parameters(config)}


def _as_nvfp4(entries: dict[str, TensorEntry], name: str) -> None:
    rows, columns = entries[name].shape
    parts = {
        name: ((rows, columns // 2), "U8"),
        f"{name}_scale": ((rows, columns // 16), "F8_E4M3"),
        f"{name}_scale_2": ((), "F32"),
    }
    entries.update({part: _entry(part, shape, dtype) for part, (shape, dtype) in parts.items()})


def _refusal(config: ModelConfig, entries: dict[str, TensorEntry]) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_tensors(config, entries)
    return str(caught.value)


# The list.


def _count(parameters: list[Parameter]) -> int:
    return sum(math.prod(p.shape) for p in parameters)


def test_glm_4_7_has_its_published_size() -> None:
    parameters = list(expected_parameters(ModelConfig.from_fields(GLM_4_7)))
    attention = 5120 * 128 * (96 + 2 * 8) + 128 * (96 + 2 * 8) + 2 * 128 + 96 * 128 * 5120
    assert attention == 136_329_472
    moe_layer = 161 * 3 * 5120 * 1536 + 160 * 5120 + 160
    norms = 92 * 2 * 5120 + 5120
    total = 92 * attention + 3 * 3 * 5120 * 12288 + 89 * moe_layer + 2 * 151552 * 5120 + norms
    assert _count(parameters) == total
    assert round(total / 1e9, 2) == 352.80
    assert len({p.name for p in parameters}) == len(parameters)


def test_glm_4_7_has_42996_mlp_matrices_for_fp4() -> None:
    """As many as nvidia/GLM-4.7-NVFP4 stores so; router, norms and biases are none of them."""
    parameters = list(expected_parameters(ModelConfig.from_fields(GLM_4_7)))
    linear = [p.name for p in parameters if p.is_linear]
    assert sum(".mlp." in name for name in linear) == 42_996 == 9 + 89 * 161 * 3
    others = {re.sub(r"\d+", "N", name) for name in linear if ".mlp." not in name}
    projections = {f"model.layers.N.self_attn.{x}_proj.weight" for x in "qkvo"}
    assert others == projections | {"lm_head.weight"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": False},
        {"use_qk_norm": False},
        {"n_shared_experts": 2},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 3},
    ],
    ids=str,
)
def test_names_and_shapes_are_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    fields = GLM_4_7 | TINY | changes | {"num_nextn_predict_layers": 0, "pad_token_id": 0}
    with torch.device("meta"):
        theirs = Glm4MoeForCausalLM(Glm4MoeConfig(**fields)).state_dict()
    ours = {p.name: p.shape for p in expected_parameters(_config(**changes))}
    # transformers stacks the experts in memory; its files hold them one by one.
    stacked = {name for name in theirs if ".mlp.experts." in name}
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items() if name not in stacked} == {
        name: shape for name, shape in ours.items() if ".mlp.experts." not in name
    }
    experts = sum(tensor.numel() for name, tensor in theirs.items() if name in stacked)
    assert experts == sum(math.prod(shape) for name, shape in ours.items() if ".mlp.experts." in name)


def test_tied_embeddings_need_no_head() -> None:
    tied, untied = (
        {p.name for p in expected_parameters(_config(tie_word_embeddings=t))} for t in (True, False)
    )
    assert untied - tied == {"lm_head.weight"}


# How ranks divide it. Of TINY: 100 ids, 4 heads and 2 KV heads of 8, MLPs of 48, 16 and 32 neurons.

SHARDS: dict[str, Shard | None] = {
    "model.embed_tokens.weight": Shard(0, 100),
    "model.layers.N.input_layernorm.weight": None,
    "model.layers.N.self_attn.q_proj.weight": Shard(0, 4),
    "model.layers.N.self_attn.q_proj.bias": Shard(0, 4),
    "model.layers.N.self_attn.k_proj.weight": Shard(0, 2),
    "model.layers.N.self_attn.k_proj.bias": Shard(0, 2),
    "model.layers.N.self_attn.v_proj.weight": Shard(0, 2),
    "model.layers.N.self_attn.v_proj.bias": Shard(0, 2),
    "model.layers.N.self_attn.q_norm.weight": None,
    "model.layers.N.self_attn.k_norm.weight": None,
    "model.layers.N.self_attn.o_proj.weight": Shard(1, 4),
    "model.layers.N.post_attention_layernorm.weight": None,
    "model.layers.N.mlp.gate_proj.weight": Shard(0, 48),
    "model.layers.N.mlp.up_proj.weight": Shard(0, 48),
    "model.layers.N.mlp.down_proj.weight": Shard(1, 48),
    "model.layers.N.mlp.gate.weight": None,
    "model.layers.N.mlp.gate.e_score_correction_bias": None,
    "model.layers.N.mlp.experts.N.gate_proj.weight": Shard(0, 16),
    "model.layers.N.mlp.experts.N.up_proj.weight": Shard(0, 16),
    "model.layers.N.mlp.experts.N.down_proj.weight": Shard(1, 16),
    "model.layers.N.mlp.shared_experts.gate_proj.weight": Shard(0, 32),
    "model.layers.N.mlp.shared_experts.up_proj.weight": Shard(0, 32),
    "model.layers.N.mlp.shared_experts.down_proj.weight": Shard(1, 32),
    "model.norm.weight": None,
    "lm_head.weight": Shard(0, 100),
}


def _kind(parameter: Parameter) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", parameter.name)


def test_every_kind_of_parameter_is_divided_by_one_rule() -> None:
    found = {(_kind(p), p.shard) for p in expected_parameters(_config(n_shared_experts=2))}
    assert found == set(SHARDS.items())


def test_shards_are_whole_pieces() -> None:
    for parameter in expected_parameters(_config()):
        if parameter.shard is not None:
            assert parameter.shape[parameter.shard.axis] % parameter.shard.num_units == 0


def test_only_routed_experts_are_experts() -> None:
    kinds = {_kind(parameter) for parameter in expected_parameters(_config()) if parameter.is_expert}
    assert kinds == {f"model.layers.N.mlp.experts.N.{name}_proj.weight" for name in ("gate", "up", "down")}


# Completeness.


def test_a_complete_checkpoint_passes() -> None:
    config = _config()
    check_tensors(config, _entries(config))


@pytest.mark.parametrize("name", [p.name for p in expected_parameters(_config())])
def test_every_missing_tensor_is_named(name: str) -> None:
    config = _config()
    entries = _entries(config)
    del entries[name]
    assert _refusal(config, entries) == f"the checkpoint lacks tensors '{name}'"


def test_of_many_missing_tensors_some_are_named() -> None:
    config = _config()
    message = _refusal(config, {})
    assert message.startswith("the checkpoint lacks tensors 'model.embed_tokens.weight', ")
    assert message.endswith(f" and {len(_entries(config)) - 5} more")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.input_layernorm.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.experts.4.up_proj.weight",
        "model.layers.1.self_attn.o_proj.bias",
        f"{DOWN}_scale",
        "extra",
    ],
)
def test_a_tensor_left_over_is_named(name: str) -> None:
    config = _config(num_nextn_predict_layers=0)
    message = _refusal(config, _entries(config) | {name: _entry(name, (1,))})
    assert message == f"shard-7.safetensors: the model has no place for tensors '{name}'"


@pytest.mark.parametrize("name", [p.name for p in expected_parameters(_config())])
def test_every_wrong_shape_is_named(name: str) -> None:
    config = _config()
    entries = _entries(config)
    shape = entries[name].shape
    for wrong in ((*shape[:-1], shape[-1] + 1), (1, *shape), shape[:-1]):
        entries[name] = _entry(name, wrong)
        expected = f"has shape {list(wrong)}, config.json calls for {list(shape)}"
        assert _refusal(config, entries) == f"shard-7.safetensors: tensor '{name}': {expected}"


@pytest.mark.parametrize("dtype", ["I8", "F8_E5M2", "F64", "BOOL", "I64"])
@pytest.mark.parametrize("name", [DOWN, "model.norm.weight", "model.layers.1.mlp.gate.weight"])
def test_a_wrong_dtype_is_named(name: str, dtype: str) -> None:
    config = _config()
    entries = _entries(config)
    entries[name] = replace(entries[name], dtype=dtype)
    expected = f"tensor '{name}': has dtype {dtype}, expected BF16 or F32 or F16"
    assert expected in _refusal(config, entries)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_floats_of_any_width_are_accepted(dtype: str) -> None:
    config = _config()
    check_tensors(config, {name: replace(e, dtype=dtype) for name, e in _entries(config).items()})


# NVFP4.


def test_nvfp4_is_accepted_for_every_linear_layer() -> None:
    config = _config()
    entries = _entries(config)
    for parameter in expected_parameters(config):
        if parameter.is_linear:
            _as_nvfp4(entries, parameter.name)
    check_tensors(config, entries)


def test_input_scales_are_accepted_and_checked() -> None:
    config = _config()
    entries = _entries(config)
    _as_nvfp4(entries, DOWN)
    name = DOWN.removesuffix("weight") + "input_scale"
    entries[name] = _entry(name, (), "F32")
    check_tensors(config, entries)
    entries[name] = _entry(name, (2,), "F32")
    assert f"tensor '{name}': has shape [2], config.json calls for [] or [1]" in _refusal(config, entries)


def test_an_input_scale_of_a_float_matrix_is_left_over() -> None:
    config = _config()
    name = DOWN.removesuffix("weight") + "input_scale"
    message = _refusal(config, _entries(config) | {name: _entry(name, (), "F32")})
    assert f"no place for tensors '{name}'" in message


@pytest.mark.parametrize("suffix", ["_scale", "_scale_2"])
def test_u8_without_a_scale_is_named(suffix: str) -> None:
    config = _config()
    entries = _entries(config)
    _as_nvfp4(entries, DOWN)
    del entries[DOWN + suffix]
    assert f"tensor '{DOWN}': is ModelOpt NVFP4 but '{DOWN}{suffix}' is missing" in _refusal(config, entries)


@pytest.mark.parametrize(
    ("suffix", "shape", "dtype", "message"),
    [
        ("", (32, 48), "U8", "has shape [32, 48], config.json calls for [32, 24]"),
        ("_scale", (32, 2), "F8_E4M3", "has shape [32, 2], config.json calls for [32, 3]"),
        ("_scale", (3, 32), "F8_E4M3", "has shape [3, 32], config.json calls for [32, 3]"),
        ("_scale", (32, 3), "F8_E8M0", "has dtype F8_E8M0, expected F8_E4M3"),
        ("_scale_2", (2,), "F32", "has shape [2], config.json calls for [] or [1]"),
        ("_scale_2", (), "BF16", "has dtype BF16, expected F32"),
    ],
)
def test_a_wrong_part_of_nvfp4_is_named(
    suffix: str, shape: tuple[int, ...], dtype: str, message: str
) -> None:
    config = _config()
    entries = _entries(config)
    _as_nvfp4(entries, DOWN)
    entries[DOWN + suffix] = _entry(DOWN + suffix, shape, dtype)
    expected = f"shard-7.safetensors: tensor '{DOWN}{suffix}': {message}"
    assert _refusal(config, entries) == expected


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate.weight", "model.embed_tokens.weight"])
def test_what_must_stay_float_cannot_be_nvfp4(name: str) -> None:
    config = _config()
    entries = _entries(config)
    _as_nvfp4(entries, name)
    assert f"tensor '{name}': has " in _refusal(config, entries)


def test_columns_that_are_no_whole_blocks() -> None:
    config = _config(intermediate_size=40)
    entries = _entries(config)
    _as_nvfp4(entries, DOWN)
    assert f"tensor '{DOWN}': 40 columns cannot be ModelOpt NVFP4 blocks of 16" in _refusal(config, entries)


# Scales of the KV cache, draft layers.


@pytest.mark.parametrize(
    "names", [["k_proj.k_scale"], ["k_proj.k_scale", "v_proj.v_scale"], ["k_scale", "v_scale"]]
)
def test_kv_scales_are_accepted_in_any_layer(names: list[str]) -> None:
    config = _config()
    entries = _entries(config)
    for layer in range(config.num_hidden_layers):
        for name in (f"model.layers.{layer}.self_attn.{name}" for name in names):
            entries[name] = _entry(name, (), "F32")
    check_tensors(config, entries)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        (f"{K_PROJ}.k_scale", (2,), "F32", "has shape [2]"),
        (f"{K_PROJ}.k_scale", (), "I8", "has dtype I8"),
        (f"{K_PROJ}.v_scale", (), "F32", "has no place"),
        ("model.layers.1.self_attn.q_proj.k_scale", (), "F32", "has no place"),
        ("model.layers.3.self_attn.k_proj.k_scale", (), "F32", "has no place"),
    ],
)
def test_wrong_kv_scales_are_named(name: str, shape: tuple[int, ...], dtype: str, message: str) -> None:
    config = _config(num_nextn_predict_layers=0)
    refusal = _refusal(config, _entries(config) | {name: _entry(name, shape, dtype)})
    assert name in refusal
    assert message in refusal


def test_two_names_of_one_kv_scale_are_refused() -> None:
    config, attention = _config(), "model.layers.1.self_attn"
    names = f"{attention}.v_proj.v_scale", f"{attention}.v_scale"
    entries = _entries(config) | {name: _entry(name, (), "F32") for name in names}
    assert f"{names[0]!r}: stands beside {names[1]!r}" in _refusal(config, entries)


def test_draft_layers_are_set_aside_unchecked() -> None:
    config = _config(num_nextn_predict_layers=2)
    names = [
        "model.layers.3.eh_proj.weight",
        "model.layers.4.mlp.experts.0.up_proj.weight",
        "model.layers.3.x",
    ]
    check_tensors(config, _entries(config) | {name: _entry(name, (7, 7), "I64") for name in names})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.2.mlp.up_proj.weight", False),
        ("model.layers.3.eh_proj.weight", True),
        ("model.layers.4.eh_proj.weight", True),
        ("model.layers.5.eh_proj.weight", False),
        ("model.layers.30.eh_proj.weight", False),
        ("model.layers.3", False),
        ("lm_head.weight", False),
        ("draft.model.layers.3.eh_proj.weight", False),
    ],
)
def test_draft_names(name: str, expected: bool) -> None:
    assert is_draft(name, _config(num_nextn_predict_layers=2)) is expected


def _draft_entries(config: ModelConfig) -> dict[str, TensorEntry]:
    return {p.name: _entry(p.name, p.shape) for p in draft_parameters(config)}


def test_a_draft_layer_is_a_sparse_layer_and_what_is_around_it() -> None:
    """GLM-4.7's, as its checkpoints have it."""
    shapes = {p.name: p.shape for p in draft_parameters(ModelConfig.from_fields(GLM_4_7))}
    assert shapes["model.layers.92.eh_proj.weight"] == (5120, 10240)
    assert shapes["model.layers.92.shared_head.head.weight"] == (151552, 5120)
    assert shapes["model.layers.92.mlp.experts.159.down_proj.weight"] == (5120, 1536)
    assert len(shapes) == 6 + 2 + 3 * 2 + 1 + 2 + 2 + 3 * 160 + 3


def test_a_draft_layer_may_leave_out_its_copies() -> None:
    config = _config(num_nextn_predict_layers=1)
    entries = _entries(config) | _draft_entries(config)
    check_draft_tensors(config, entries)
    for name in ("embed_tokens", "shared_head.head"):
        del entries[f"model.layers.3.{name}.weight"]
    check_draft_tensors(config, entries)


@pytest.mark.parametrize("name", ["eh_proj", "shared_head.norm", "enorm", "mlp.gate", "self_attn.o_proj"])
def test_what_a_draft_layer_lacks_is_named(name: str) -> None:
    config = _config(num_nextn_predict_layers=1)
    entries = _entries(config) | _draft_entries(config)
    del entries[f"model.layers.3.{name}.weight"]
    with pytest.raises(CheckpointError, match=rf"lacks tensors 'model\.layers\.3\.{name}\.weight'"):
        check_draft_tensors(config, entries)


@pytest.mark.parametrize(
    ("name", "shape"), [("eh_proj", (32, 32)), ("enorm", (31,)), ("embed_tokens", (9, 32))]
)
def test_wrong_shapes_of_a_draft_layer_are_named(name: str, shape: tuple[int, ...]) -> None:
    config = _config(num_nextn_predict_layers=1)
    full = f"model.layers.3.{name}.weight"
    entries = _entries(config) | _draft_entries(config) | {full: _entry(full, shape)}
    with pytest.raises(CheckpointError, match=re.escape(full)):
        check_draft_tensors(config, entries)


def test_what_a_draft_layer_has_no_place_for_is_named() -> None:
    config = _config(num_nextn_predict_layers=1)
    name = "model.layers.3.other.weight"
    with pytest.raises(CheckpointError, match="the draft layer has no place for"):
        check_draft_tensors(config, _entries(config) | _draft_entries(config) | {name: _entry(name, (3,))})
