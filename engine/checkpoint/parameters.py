"""Which tensors a GLM checkpoint must hold, and how ranks divide each.

Layers from num_hidden_layers on are draft (MTP) layers: recognised, and checked only where they are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nybble.engine.checkpoint.checkpoint import TensorEntry
from nybble.engine.checkpoint.layouts import FLOAT_DTYPES, check_entry, check_matrix
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.errors import CheckpointError


@dataclass(frozen=True)
class Shard:
    """Tensor-parallel ranks divide dimension `axis` evenly, in `num_units` pieces that stay whole.

    Where ranks exceed the pieces, several ranks hold the same one.
    """

    axis: int
    num_units: int


@dataclass(frozen=True)
class Parameter:
    """A tensor that the model needs.

    is_linear: a matrix that may be stored quantized; shard: how tensor-parallel ranks divide it, None if
    each holds all of it; is_expert: part of a routed expert, which expert-parallel ranks hold whole.
    """

    name: str
    shape: tuple[int, ...]
    is_linear: bool = False
    shard: Shard | None = None
    is_expert: bool = False

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    def is_stored_in(self, entries: Mapping[str, TensorEntry]) -> bool:
        return self.name in entries or (self.is_linear and f"{self.module}.weight_packed" in entries)


def expected_parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Every parameter of the main model, under its checkpoint name."""
    vocabulary = (config.vocab_size, config.hidden_size)
    by_id = Shard(0, config.vocab_size)
    yield Parameter("model.embed_tokens.weight", vocabulary, shard=by_id)
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer)
    yield Parameter("model.norm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield Parameter("lm_head.weight", vocabulary, is_linear=True, shard=by_id)


def draft_parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Every parameter of the draft (MTP) layers: of each a decoder layer, what precedes it and what follows.

    Embedding and head are copies of the main model's, which a checkpoint may leave out.
    """
    first, hidden = config.num_hidden_layers, config.hidden_size
    by_id = Shard(0, config.vocab_size)
    for layer in range(first, first + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}"
        yield from _layer(config, layer)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield Parameter(f"{prefix}.{name}.weight", (hidden,))
        yield Parameter(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), is_linear=True)
        yield Parameter(f"{prefix}.embed_tokens.weight", (config.vocab_size, hidden), shard=by_id)
        shape = (config.vocab_size, hidden)
        yield Parameter(f"{prefix}.shared_head.head.weight", shape, is_linear=True, shard=by_id)


def all_parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Those of the main model, then those of the draft layers."""
    yield from expected_parameters(config)
    yield from draft_parameters(config)


def check_tensors(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> None:
    """Compare a checkpoint's tensors with what `config` calls for, reading no data.

    Raises:
        CheckpointError: tensors are missing, left over, of a wrong dtype or of a wrong shape.
    """
    parameters = list(expected_parameters(config))
    used = _check_parameters(parameters, entries)
    left_over = sorted(name for name in entries.keys() - used if not is_draft(name, config))
    if left_over:
        raise CheckpointError(
            f"{entries[left_over[0]].file.name}: the model has no place for {_some(left_over)}"
        )


def check_draft_tensors(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> None:
    """Compare the draft layers' tensors with what `config` calls for, reading no data.

    Raises:
        CheckpointError: tensors are missing, left over, of a wrong dtype or of a wrong shape.
    """
    is_needed = re.compile(r"(?!.*\.(embed_tokens|shared_head\.head)\.)").match
    parameters = [p for p in draft_parameters(config) if is_needed(p.name) or p.is_stored_in(entries)]
    used = _check_parameters(parameters, entries)
    left_over = sorted(name for name in entries.keys() - used if is_draft(name, config))
    if left_over:
        raise CheckpointError(
            f"{entries[left_over[0]].file.name}: the draft layer has no place for {_some(left_over)}"
        )


def is_draft(name: str, config: ModelConfig) -> bool:
    """Whether a tensor belongs to a draft (MTP) layer."""
    layer, first = layer_of(name), config.num_hidden_layers
    return layer is not None and first <= layer < first + config.num_nextn_predict_layers


def layer_of(name: str) -> int | None:
    """Number of the layer that a tensor belongs to; None for those outside of layers."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def _layer(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    prefix, hidden = f"model.layers.{layer}", config.hidden_size
    yield Parameter(f"{prefix}.input_layernorm.weight", (hidden,))
    yield from _attention(config, f"{prefix}.self_attn")
    yield Parameter(f"{prefix}.post_attention_layernorm.weight", (hidden,))
    if config.is_dense_layer(layer):
        yield from _mlp(f"{prefix}.mlp", hidden, config.intermediate_size)
        return
    yield Parameter(f"{prefix}.mlp.gate.weight", (config.n_routed_experts, hidden))
    yield Parameter(f"{prefix}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,))
    for expert in range(config.n_routed_experts):
        name = f"{prefix}.mlp.experts.{expert}"
        yield from _mlp(name, hidden, config.moe_intermediate_size, is_expert=True)
    yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, config.shared_expert_size)


def _attention(config: ModelConfig, prefix: str) -> Iterator[Parameter]:
    """Ranks divide heads: rows of what produces them, columns of what takes them."""
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for name, units in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        rows, shard = units * width, Shard(0, units)
        yield Parameter(f"{prefix}.{name}.weight", (rows, config.hidden_size), is_linear=True, shard=shard)
        if config.attention_bias:
            yield Parameter(f"{prefix}.{name}.bias", (rows,), shard=shard)
    if config.use_qk_norm:
        yield Parameter(f"{prefix}.q_norm.weight", (width,))
        yield Parameter(f"{prefix}.k_norm.weight", (width,))
    shape, by_head = (config.hidden_size, heads * width), Shard(1, heads)
    yield Parameter(f"{prefix}.o_proj.weight", shape, is_linear=True, shard=by_head)


def _mlp(prefix: str, hidden: int, width: int, is_expert: bool = False) -> Iterator[Parameter]:
    """Ranks divide the neurons."""
    for name, shape, axis in (
        ("gate_proj", (width, hidden), 0),
        ("up_proj", (width, hidden), 0),
        ("down_proj", (hidden, width), 1),
    ):
        yield Parameter(
            f"{prefix}.{name}.weight", shape, is_linear=True, shard=Shard(axis, width), is_expert=is_expert
        )


def _check_parameters(parameters: list[Parameter], entries: Mapping[str, TensorEntry]) -> set[str]:
    """Check that all are there and well-formed; returns the names of the tensors that store them."""
    missing = [p.name for p in parameters if not p.is_stored_in(entries)]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}")
    used: set[str] = set()
    for parameter in parameters:
        used.update(_check_parameter(parameter, entries))
    return used


def _check_parameter(parameter: Parameter, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Check one parameter; yields the names of the tensors that store it."""
    if parameter.is_linear:
        rows, columns = parameter.shape
        yield from check_matrix(parameter.module, (rows, columns), entries)
    else:
        check_entry(entries[parameter.name], (parameter.shape,), FLOAT_DTYPES)
        yield parameter.name
    yield from _check_kv_scale(parameter.name, entries)


def _check_kv_scale(weight: str, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    """The scale of an FP8 KV cache, one a layer, that may ride with the projection of keys or of values."""
    match = re.fullmatch(r"(.*\.self_attn)\.([kv])_proj\.weight", weight)
    found = [name for name in kv_scale_names(*match.groups()) if name in entries] if match else []
    for name in found:
        check_entry(entries[name], ((), (1,)), ("F32", "BF16"))
    if len(found) > 1:
        raise CheckpointError(f"{entries[found[0]]}: stands beside {found[1]!r}, which means the same")
    yield from found


def kv_scale_names(attention: str, letter: str) -> tuple[str, str]:
    """Under which names the module `attention` may store a scale of its keys ("k") or values ("v")."""
    return f"{attention}.{letter}_proj.{letter}_scale", f"{attention}.{letter}_scale"


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    rest = len(names) - limit
    return f"tensors {shown}" + (f" and {rest} more" if rest > 0 else "")
