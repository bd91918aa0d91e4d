"""config.json of a `Glm4MoeForCausalLM` checkpoint, as typed values.

Nothing is defaulted: transformers' class defaults are those of another model of the family, so a
missing field would silently make a different network. A field that is not known is refused too,
since it may change the mathematics; fields known to change nothing at inference are listed below.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.engine.errors import CheckpointError, ConfigError

ARCHITECTURE = "Glm4MoeForCausalLM"

# Bookkeeping, training settings and generation settings: no effect on the forward pass.
_INERT = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "id2label", "initializer_range", "is_encoder_decoder",
    "label2id", "moe_router_dtype", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "problem_type", "return_dict", "router_aux_loss_coef",
    "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip

# Fields that may stand in a config as long as they say what this model code does anyway.
_FIXED: dict[str, tuple[object, ...]] = {
    "model_type": ("glm4_moe",),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "rope_interleave": (False,),
    "sliding_window": (None,),
}

# Either spelling will do; the second is what transformers 5 writes.
_ALIASES = {"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"}


@dataclass(frozen=True)
class ModelConfig:
    """The network's shape. Field names are those of config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool
    use_qk_norm: bool
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    first_k_dense_replace: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    eos_token_ids: tuple[int, ...]

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def shared_expert_size(self) -> int:
        return self.moe_intermediate_size * self.n_shared_experts

    def is_dense_layer(self, layer: int) -> bool:
        """Whether `layer` has an MLP instead of experts."""
        return layer < self.first_k_dense_replace

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read `directory`/config.json.

        Raises:
            CheckpointError: there is no such file or it is not a JSON object.
            ConfigError: a field is missing, of a wrong type, out of range or not supported.
        """
        return cls.from_fields(read_json_object(directory / "config.json"))

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> ModelConfig:
        """Build from the parsed config.json. Raises ConfigError as `from_directory`."""
        return _build(_Fields(fields))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError naming the file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields


class _Fields:
    """Takes fields one by one, checks their types, and names what is left over."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._left = dict(fields)

    def take(self, name: str) -> Any:
        for spelling in (name, _ALIASES.get(name, name)):
            if spelling in self._left:
                return self._left.pop(spelling)
        raise ConfigError(f"config.json: field {name!r} is missing")

    def discard(self, name: str) -> Any:
        return self._left.pop(name, None)

    def has(self, name: str) -> bool:
        return self._left.get(name) is not None

    def integer(self, name: str, minimum: int) -> int:
        value = self.take(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(
                f"config.json: field {name!r} is {value!r}, expected an integer of at least {minimum}"
            )
        return value

    def number(self, name: str) -> float:
        value = self.take(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
            raise ConfigError(f"config.json: field {name!r} is {value!r}, expected a positive number")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: field {name!r} is {value!r}, expected true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.take(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ConfigError(f"config.json: field {name!r} is {value!r}, expected token ids")
        return tuple(ids)

    def check_left_over(self) -> None:
        for name, supported in _FIXED.items():
            value = self._left.pop(name, supported[0])
            if value not in supported:
                raise ConfigError(
                    f"config.json: field {name!r} is {value!r}, supported is only "
                    + " or ".join(map(repr, supported))
                )
        unknown = sorted(self._left.keys() - _INERT)
        if unknown:
            raise ConfigError(
                f"config.json: field {unknown[0]!r} is not supported "
                f"(all unknown fields: {', '.join(unknown)})"
            )


def _build(fields: _Fields) -> ModelConfig:
    _check_architecture(fields)
    fields.discard("quantization_config")  # each tensor's own dtype says how it is stored
    rope_theta, partial_rotary_factor = _rope(fields)
    config = ModelConfig(
        vocab_size=fields.integer("vocab_size", 1),
        hidden_size=fields.integer("hidden_size", 1),
        num_hidden_layers=fields.integer("num_hidden_layers", 1),
        num_attention_heads=fields.integer("num_attention_heads", 1),
        num_key_value_heads=fields.integer("num_key_value_heads", 1),
        head_dim=fields.integer("head_dim", 2),
        attention_bias=fields.boolean("attention_bias"),
        use_qk_norm=fields.boolean("use_qk_norm"),
        intermediate_size=fields.integer("intermediate_size", 1),
        moe_intermediate_size=fields.integer("moe_intermediate_size", 1),
        n_routed_experts=fields.integer("n_routed_experts", 1),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 1),
        n_shared_experts=fields.integer("n_shared_experts", 1),
        first_k_dense_replace=fields.integer("first_k_dense_replace", 0),
        n_group=fields.integer("n_group", 1),
        topk_group=fields.integer("topk_group", 1),
        norm_topk_prob=fields.boolean("norm_topk_prob"),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=rope_theta,
        partial_rotary_factor=partial_rotary_factor,
        max_position_embeddings=fields.integer("max_position_embeddings", 1),
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", 0),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )
    fields.check_left_over()
    _check_consistency(config)
    return config


def _check_architecture(fields: _Fields) -> None:
    architectures = fields.take("architectures")
    if architectures != [ARCHITECTURE]:
        raise ConfigError(
            f"config.json: field 'architectures' is {architectures!r}, supported is only "
            f"{[ARCHITECTURE]!r} (GLM-4.5, 4.5-Air, 4.6, 4.7)"
        )


def _rope(fields: _Fields) -> tuple[float, float]:
    """rope_theta and partial_rotary_factor, from either spelling of the config."""
    if not fields.has("rope_parameters"):
        fields.discard("rope_parameters")
        return fields.number("rope_theta"), fields.number("partial_rotary_factor")
    parameters = fields.take("rope_parameters")
    if not isinstance(parameters, dict) or parameters.get("rope_type", "default") != "default":
        raise ConfigError(
            f"config.json: field 'rope_parameters' is {parameters!r}, supported is only rope_type 'default'"
        )
    nested = _Fields({name: value for name, value in parameters.items() if name != "rope_type"})
    values = nested.number("rope_theta"), nested.number("partial_rotary_factor")
    nested.check_left_over()
    for name, value in zip(("rope_theta", "partial_rotary_factor"), values, strict=True):
        if fields.has(name) and fields.number(name) != value:
            raise ConfigError(f"config.json: {name!r} and 'rope_parameters' contradict each other")
    return values


def _check_consistency(config: ModelConfig) -> None:
    def require(condition: bool, name: str, expectation: str) -> None:
        if not condition:
            value = getattr(config, name)
            raise ConfigError(f"config.json: field {name!r} is {value!r}, expected {expectation}")

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    require(heads % kv_heads == 0, "num_attention_heads", f"a multiple of {kv_heads} KV heads")
    experts, groups = config.n_routed_experts, config.n_group
    require(experts % groups == 0, "n_group", f"a divisor of {experts} routed experts")
    require(config.topk_group <= groups, "topk_group", f"at most n_group = {groups}")
    choice = experts // groups * config.topk_group
    require(config.num_experts_per_tok <= choice, "num_experts_per_tok", f"at most {choice}")
    has_pairs = config.topk_group == groups or experts // groups >= 2
    require(has_pairs, "n_group", "groups of at least two experts")
    require(config.partial_rotary_factor <= 1, "partial_rotary_factor", "at most 1")
    is_pairable = 0 < config.rotary_dim <= config.head_dim and config.rotary_dim % 2 == 0
    require(is_pairable, "partial_rotary_factor", "an even number of rotated dimensions")
    layers = config.num_hidden_layers
    require(config.first_k_dense_replace <= layers, "first_k_dense_replace", f"at most {layers}")
    if any(token_id >= config.vocab_size for token_id in config.eos_token_ids):
        raise ConfigError(
            f"config.json: field 'eos_token_id' is {list(config.eos_token_ids)!r}, expected ids below "
            f"vocab_size = {config.vocab_size}"
        )
