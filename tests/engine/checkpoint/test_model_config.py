from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import Glm4MoeConfig

from nybble.engine.checkpoint.model_config import ModelConfig, read_json_object
from nybble.engine.errors import CheckpointError, ConfigError

DATA = Path(__file__).parents[1] / "data"
GLM_4_7: dict[str, Any] = json.loads((DATA / "glm-4.7-config.json").read_text())


def _config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_fields(GLM_4_7 | changes)


def _with_rope_parameters(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5} | changes
    old = {"rope_theta", "partial_rotary_factor", "rope_scaling"}
    return {name: value for name, value in GLM_4_7.items() if name not in old} | {"rope_parameters": rope}


@pytest.mark.parametrize("file", ["glm-4.7-config.json", "glm-4.7-nvfp4-config.json"])
def test_published_configs(file: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((DATA / file).read_bytes())
    assert asdict(ModelConfig.from_directory(tmp_path)) == {
        "vocab_size": 151552,
        "hidden_size": 5120,
        "num_hidden_layers": 92,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "use_qk_norm": True,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 160,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 202752,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 1,
        "eos_token_ids": (151329, 151336, 151338),
    }


def test_derived_sizes() -> None:
    config = _config(n_shared_experts=2)
    assert config.rotary_dim == 64
    assert config.shared_expert_size == 3072
    assert [config.is_dense_layer(layer) for layer in range(5)] == [True, True, True, False, False]


def test_the_spelling_of_transformers_5(tmp_path: Path) -> None:
    old = ModelConfig.from_fields(GLM_4_7)
    Glm4MoeConfig(**GLM_4_7).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written
    assert "rope_theta" not in written
    written["architectures"] = GLM_4_7["architectures"]
    assert ModelConfig.from_fields(written) == old


@pytest.mark.parametrize(
    ("old", "new"),
    [("n_routed_experts", "num_local_experts"), ("num_nextn_predict_layers", "num_mtp_layers")],
)
def test_other_names_of_a_field(old: str, new: str) -> None:
    renamed = {new if name == old else name: value for name, value in GLM_4_7.items()}
    assert ModelConfig.from_fields(renamed) == ModelConfig.from_fields(GLM_4_7)
    with pytest.raises(ConfigError, match=new):
        ModelConfig.from_fields(GLM_4_7 | {new: 7})


def test_rope_parameters() -> None:
    assert ModelConfig.from_fields(_with_rope_parameters()) == ModelConfig.from_fields(GLM_4_7)
    assert _config(rope_parameters=None) == ModelConfig.from_fields(GLM_4_7)
    both = _with_rope_parameters() | {"rope_theta": 1e6, "partial_rotary_factor": 0.5}
    assert ModelConfig.from_fields(both) == ModelConfig.from_fields(GLM_4_7)


NEEDED = [
    "architectures",
    "eos_token_id",
    *(f.name for f in fields(ModelConfig) if f.name != "eos_token_ids"),
]


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_field_is_named(name: str) -> None:
    without = {key: value for key, value in GLM_4_7.items() if key != name}
    assert len(without) == len(GLM_4_7) - 1
    with pytest.raises(ConfigError, match=f"config.json: field '{name}' is missing"):
        ModelConfig.from_fields(without)


@pytest.mark.parametrize("name", ["rope_theta", "partial_rotary_factor"])
def test_a_missing_rope_parameter_is_named(name: str) -> None:
    fields_ = _with_rope_parameters()
    del fields_["rope_parameters"][name]
    with pytest.raises(ConfigError, match=f"field '{name}' is missing"):
        ModelConfig.from_fields(fields_)


@pytest.mark.parametrize("name", sorted(GLM_4_7.keys() - set(NEEDED)))
def test_all_other_fields_may_be_missing(name: str) -> None:
    without = {key: value for key, value in GLM_4_7.items() if key != name}
    assert ModelConfig.from_fields(without) == ModelConfig.from_fields(GLM_4_7)


INTEGERS = [name for name in NEEDED if type(GLM_4_7[name]) is int and name != "rope_theta"]
NUMBERS = ["routed_scaling_factor", "rms_norm_eps", "rope_theta", "partial_rotary_factor"]
BOOLEANS = ["attention_bias", "use_qk_norm", "norm_topk_prob", "tie_word_embeddings"]


@pytest.mark.parametrize("value", [None, "8", 8.0, True, -1, [8]], ids=repr)
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_integers(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"field '{name}' is .*, expected an integer of at least [012]"):
        _config(**{name: value})


@pytest.mark.parametrize(
    "name", sorted(set(INTEGERS) - {"first_k_dense_replace", "num_nextn_predict_layers"})
)
def test_sizes_are_not_zero(name: str) -> None:
    with pytest.raises(ConfigError, match=f"field '{name}' is 0"):
        _config(**{name: 0})


@pytest.mark.parametrize("value", [None, "1", True, 0, -0.5, float("nan")], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_positive(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"field '{name}' is .*, expected a positive number"):
        _config(**{name: value})


@pytest.mark.parametrize("value", [None, 0, 1, "true"], ids=repr)
@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_are_booleans(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"field '{name}' is .*, expected true or false"):
        _config(**{name: value})


@pytest.mark.parametrize(("value", "expected"), [(5, (5,)), ([5], (5,)), ([], ()), (None, ()), (0, (0,))])
def test_eos_token_ids(value: object, expected: tuple[int, ...]) -> None:
    assert _config(eos_token_id=value).eos_token_ids == expected


@pytest.mark.parametrize("value", ["5", [5, None], -1, 1.0, True, [[5]]], ids=repr)
def test_wrong_eos_token_ids(value: object) -> None:
    with pytest.raises(ConfigError, match=r"field 'eos_token_id' is .*, expected token ids"):
        _config(eos_token_id=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architectures", ["Glm4MoeLiteForCausalLM"]),
        ("architectures", ["Glm4MoeForCausalLM", "Other"]),
        ("architectures", None),
        ("architectures", "Glm4MoeForCausalLM"),
        ("model_type", "glm4"),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("rope_interleave", True),
        ("sliding_window", 4096),
    ],
)
def test_unsupported_values_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"field '{name}' is .*, supported is only"):
        _config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("sliding_window", None)]
)
def test_supported_values_may_be_spelled_out(name: str, value: object) -> None:
    assert _config(**{name: value}) == ModelConfig.from_fields(GLM_4_7)


def test_unknown_fields_are_all_named() -> None:
    with pytest.raises(ConfigError, match=r"field 'attn_gate' is not supported .*: attn_gate, mup_scale\)"):
        _config(mup_scale=3, attn_gate=True)


@pytest.mark.parametrize(
    "changes",
    [{"rope_type": "yarn"}, {"factor": 4.0}, {"rope_theta": "1e6"}, {"partial_rotary_factor": 0}],
    ids=str,
)
def test_unsupported_rope_parameters(changes: dict[str, object]) -> None:
    [name] = changes
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_fields(_with_rope_parameters(**changes))


@pytest.mark.parametrize("value", [[], "default", 1], ids=repr)
def test_rope_parameters_are_an_object(value: object) -> None:
    with pytest.raises(ConfigError, match="field 'rope_parameters' is"):
        ModelConfig.from_fields(_with_rope_parameters() | {"rope_parameters": value})


@pytest.mark.parametrize(("name", "value"), [("rope_theta", 1e4), ("partial_rotary_factor", 1.0)])
def test_rope_that_is_said_twice_must_agree(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' and 'rope_parameters' contradict"):
        ModelConfig.from_fields(_with_rope_parameters() | {name: value})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("num_attention_heads", {"num_key_value_heads": 7}),
        ("n_group", {"n_group": 3}),
        ("topk_group", {"topk_group": 2}),
        ("num_experts_per_tok", {"num_experts_per_tok": 161}),
        ("num_experts_per_tok", {"n_group": 40, "topk_group": 1}),
        ("n_group", {"n_group": 160, "topk_group": 8}),
        ("partial_rotary_factor", {"partial_rotary_factor": 1.5}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.001}),
        ("partial_rotary_factor", {"head_dim": 6}),
        ("first_k_dense_replace", {"first_k_dense_replace": 93}),
        ("eos_token_id", {"eos_token_id": [5, 151552]}),
    ],
)
def test_contradictions_are_named(name: str, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"field '{name}.*, expected"):
        _config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_group": 8, "topk_group": 4},
        {"n_group": 160, "topk_group": 160},
        {"first_k_dense_replace": 92},
        {"first_k_dense_replace": 0},
        {"num_key_value_heads": 96},
        {"partial_rotary_factor": 1.0},
        {"num_nextn_predict_layers": 0},
    ],
    ids=str,
)
def test_limits_are_allowed(changes: dict[str, object]) -> None:
    config = _config(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


def test_the_directory_and_the_input_are_not_changed() -> None:
    before = json.dumps(GLM_4_7)
    ModelConfig.from_fields(GLM_4_7)
    assert json.dumps(GLM_4_7) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
    ],
)
def test_unreadable_files_are_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        ModelConfig.from_directory(tmp_path)


def test_a_directory_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: not readable"):
        read_json_object(tmp_path / "config.json")
