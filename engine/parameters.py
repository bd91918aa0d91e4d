"""Which tensors a GLM checkpoint must hold, and in which forms.

A matrix is stored as floats, or in ModelOpt's NVFP4 layout, told apart by the dtype of `NAME.weight`
and not by the config's ignore list, which does not name the router although it stays BF16:

    NAME.weight          U8 [N, K / 2]        two E2M1 codes a byte, low nibble = even column
    NAME.weight_scale    F8_E4M3 [N, K / 16]
    NAME.weight_scale_2  F32 []               multiplies
    NAME.input_scale     F32 []               may be absent; for 4-bit activations only

Layers from num_hidden_layers on are draft (MTP) layers: recognised and set aside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nybble.engine.checkpoint import TensorEntry
from nybble.engine.errors import CheckpointError
from nybble.engine.model_config import ModelConfig
from nybble.kernels.quantized_tensor import NVFP4

_FLOATS = ("BF16", "F32", "F16")


@dataclass(frozen=True)
class Parameter:
    """A tensor that the model needs. `is_linear`: a matrix that may be stored in FP4."""

    name: str
    shape: tuple[int, ...]
    is_linear: bool = False


def expected_parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Every parameter of the main model, under its checkpoint name."""
    yield Parameter("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer)
    yield Parameter("model.norm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield Parameter("lm_head.weight", (config.vocab_size, config.hidden_size), is_linear=True)


def check_tensors(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> None:
    """Compare a checkpoint's tensors with what `config` calls for, reading no data.

    Raises:
        CheckpointError: tensors are missing, left over, of a wrong dtype or of a wrong shape.
    """
    parameters = list(expected_parameters(config))
    missing = [p.name for p in parameters if p.name not in entries]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}")
    used: set[str] = set()
    for parameter in parameters:
        used.update(_check_parameter(parameter, entries))
    left_over = sorted(name for name in entries.keys() - used if not is_draft(name, config))
    if left_over:
        raise CheckpointError(
            f"{entries[left_over[0]].file.name}: the model has no place for {_some(left_over)}"
        )


def is_draft(name: str, config: ModelConfig) -> bool:
    """Whether a tensor belongs to a draft (MTP) layer."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    first = config.num_hidden_layers
    return match is not None and first <= int(match[1]) < first + config.num_nextn_predict_layers


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
        yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, config.moe_intermediate_size)
    yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, config.shared_expert_size)


def _attention(config: ModelConfig, prefix: str) -> Iterator[Parameter]:
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    for name, rows in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
        yield Parameter(f"{prefix}.{name}.weight", (rows, config.hidden_size), is_linear=True)
        if config.attention_bias:
            yield Parameter(f"{prefix}.{name}.bias", (rows,))
    if config.use_qk_norm:
        yield Parameter(f"{prefix}.q_norm.weight", (config.head_dim,))
        yield Parameter(f"{prefix}.k_norm.weight", (config.head_dim,))
    yield Parameter(f"{prefix}.o_proj.weight", (config.hidden_size, query), is_linear=True)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}.gate_proj.weight", (width, hidden), is_linear=True)
    yield Parameter(f"{prefix}.up_proj.weight", (width, hidden), is_linear=True)
    yield Parameter(f"{prefix}.down_proj.weight", (hidden, width), is_linear=True)


def _check_parameter(parameter: Parameter, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Check one parameter; yields the names of the tensors that store it."""
    entry = entries[parameter.name]
    yield entry.name
    if parameter.is_linear and entry.dtype == "U8":
        yield from _check_nvfp4(entry, parameter.shape, entries)
    else:
        _check_entry(entry, parameter.shape, _FLOATS)
    # Scales of an FP8 KV cache, one a layer, ride with the projections that produce K and V.
    for owner, scale in (("k_proj.weight", "k_proj.k_scale"), ("v_proj.weight", "v_proj.v_scale")):
        name = parameter.name.removesuffix(owner) + scale
        if parameter.name.endswith(owner) and name in entries:
            _check_entry(entries[name], (), ("F32",))
            yield name


def _check_nvfp4(
    entry: TensorEntry, shape: tuple[int, ...], entries: Mapping[str, TensorEntry]
) -> Iterator[str]:
    rows, columns = shape
    if columns % NVFP4.block_size:
        raise CheckpointError(f"{entry}: {columns} columns cannot be NVFP4 blocks of 16")
    _check_entry(entry, (rows, columns // 2), ("U8",))
    scales = (
        ("_scale", (rows, columns // NVFP4.block_size), "F8_E4M3"),
        ("_scale_2", (), "F32"),
    )
    for suffix, scale_shape, dtype in scales:
        name = entry.name + suffix
        if name not in entries:
            raise CheckpointError(f"{entry}: is NVFP4 but {name!r} is missing")
        _check_entry(entries[name], scale_shape, (dtype,))
        yield name
    input_scale = entry.name.removesuffix("weight") + "input_scale"
    if input_scale in entries:
        _check_entry(entries[input_scale], (), ("F32",))
        yield input_scale


def _check_entry(entry: TensorEntry, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if entry.shape != shape:
        raise CheckpointError(f"{entry}: has shape {list(entry.shape)}, config.json calls for {list(shape)}")
    if entry.dtype not in dtypes:
        raise CheckpointError(f"{entry}: has dtype {entry.dtype}, expected {' or '.join(dtypes)}")


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    rest = len(names) - limit
    return f"tensors {shown}" + (f" and {rest} more" if rest > 0 else "")
