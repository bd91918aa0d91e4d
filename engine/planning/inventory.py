"""What a model consists of: its modules grouped by layer, part and layout, in parameters and bytes.

The recipes for a bare config leave out the 8 bytes of scales that a matrix has.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from nybble.engine.checkpoint.checkpoint import TensorEntry
from nybble.engine.checkpoint.layouts import FP8_PER_CHANNEL, find_layout
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.parameters import Parameter, Shard, all_parameters
from nybble.engine.checkpoint.weight_dtypes import WeightDtype, WeightDtypes
from nybble.engine.errors import CheckpointError, ConfigError
from nybble.kernels.quantized_tensor import NVFP4

KVDtype = Literal["fp32", "bf16", "fp8"]
KV_ITEM_BYTES: dict[KVDtype, int] = {"fp32": 4, "bf16": 2, "fp8": 1}

# Module names below "model.layers.N.", and the part that each belongs to.
EXPERTS, EMBEDDING, HEAD = "routed experts", "embedding", "lm_head"
_PARTS = (
    (r"self_attn\.([qkvo]_proj|[qk]_norm)", "attention"),
    (r"mlp\.(gate|up|down)_proj", "dense MLP"),
    (r"mlp\.experts\.\d+\.\w+", EXPERTS),
    (r"mlp\.shared_experts\.\w+", "shared experts"),
    (r"mlp\.gate", "router"),
    (r"embed_tokens", EMBEDDING),
    (r"lm_head|shared_head\.head", HEAD),
    (r"\w*norm|shared_head\.norm", "norms"),
    (r"eh_proj", "draft projection"),
)
DRAFT, DRAFT_COPIES = "draft layer", "draft copies, not loaded"
_FLOAT_PARTS = frozenset({"norms", "router"})
_ROWS = tuple(dict.fromkeys([*(part for _, part in _PARTS), DRAFT, DRAFT_COPIES]))
# nvidia/GLM-4.7-NVFP4: these in NVFP4 (half a byte of code, a byte of scale for 16), everything else in BF16.
_NVFP4_PARTS = frozenset({"dense MLP", EXPERTS, "shared experts"})


@dataclass(frozen=True)
class Group:
    """Modules that are alike. `layer` is None outside of the layers; `block_size` is 1 without blocks.

    `num_columns`: of the matrices whose columns ranks divide.
    """

    layer: int | None
    is_draft: bool
    part: str
    shard: Shard | None
    num_columns: int = 0
    layout: str = "BF16"
    block_size: int = 1
    num_parameters: int = 0
    num_bytes: int = 0

    @property
    def row(self) -> str:
        """Its row in the table of parts; the draft layer's copies of embedding and head are not loaded."""
        if not self.is_draft:
            return self.part
        return DRAFT_COPIES if self.part in (EMBEDDING, HEAD) else DRAFT


@dataclass(frozen=True)
class PartSize:
    """A row of the table of parts."""

    part: str
    layouts: tuple[str, ...]
    num_parameters: int
    num_bytes: int

    @classmethod
    def of(cls, part: str, groups: Sequence[Group]) -> PartSize:
        return cls(
            part=part,
            layouts=tuple(sorted({group.layout for group in groups})),
            num_parameters=sum(group.num_parameters for group in groups),
            num_bytes=sum(group.num_bytes for group in groups),
        )


@dataclass(frozen=True)
class Inventory:
    """What a model consists of. `groups` come in any order."""

    config: ModelConfig
    groups: tuple[Group, ...]

    @property
    def main(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if not group.is_draft)

    @property
    def num_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.config.num_hidden_layers + len({group.layer for group in self.groups if group.is_draft})

    @property
    def has_draft(self) -> bool:
        return len(self.main) < len(self.groups)

    def without_draft(self) -> Inventory:
        return replace(self, groups=self.main)

    def recast(self, weight_dtypes: WeightDtypes) -> Inventory:
        """With the blocks that re-quantizing wants; bytes stay those of the files where it saves some."""
        dtypes: dict[tuple[str, bool], WeightDtype] = {(EXPERTS, True): weight_dtypes.draft_expert_dtype}
        for is_draft in (False, True):
            dtypes["attention", is_draft] = weight_dtypes.attention_dtype
            dtypes["dense MLP", is_draft] = weight_dtypes.dense_mlp_dtype
            dtypes["shared experts", is_draft] = weight_dtypes.shared_expert_dtype
        groups = (_recast(group, dtypes.get((group.part, group.is_draft), "stored")) for group in self.groups)
        return replace(self, groups=tuple(groups))

    def dequantized(self, item_bytes: int) -> Inventory:
        """With every weight held in `item_bytes`, as by a backend that does not compute on FP4."""
        return replace(
            self, groups=tuple(replace(g, num_bytes=g.num_parameters * item_bytes) for g in self.groups)
        )

    def as_int8(self) -> Inventory:
        """With FP4 and FP8 as stored, other matrices in int8 with a float16 scale for 32 columns, and float32
        for the embedding, norms and routers, as by the native CPU backend; without its 4 bytes for a row."""
        held = (replace(group, num_bytes=_int8_bytes(group, self.config)) for group in self.groups)
        return replace(self, groups=tuple(held))

    def part_sizes(self) -> tuple[PartSize, ...]:
        rows = {row: [group for group in self.groups if group.row == row] for row in _ROWS}
        return tuple(PartSize.of(row, groups) for row, groups in rows.items() if groups)

    def active_parameters(self) -> float:
        """Parameters that decoding one token reads."""
        return sum(group.num_parameters * read_share(group, self.config, 1) for group in self.main)

    def step_bytes(self, batch: int) -> float:
        """Bytes of weights that one decoding step of `batch` sequences reads, each once."""
        return sum(group.num_bytes * read_share(group, self.config, batch) for group in self.main)

    def kv_bytes_per_token(self, dtype: KVDtype) -> int:
        """Bytes of keys and values of one token, in all layers, each head once."""
        return self.num_layers * kv_layer_bytes(self.config, self.config.num_key_value_heads, dtype)


def read_inventory(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> Inventory:
    """The inventory of a checkpoint by its tensors' dtypes and shapes.

    Raises:
        CheckpointError: a tensor belongs to no part of the model, or to no known layout.
    """
    modules = _modules(config)
    num_bytes: Counter[str] = Counter()
    for entry in entries.values():
        num_bytes[entry.name.rpartition(".")[0]] += entry.num_bytes
    groups = []
    for module, size in num_bytes.items():
        if module not in modules:
            raise CheckpointError(f"the model has no place for tensors of {module!r}")
        layout = find_layout(module, entries)
        name = entries[f"{module}.weight"].dtype if layout.format is None else layout.name
        block_size = (layout.format.block_size if layout.format else None) or 1
        groups.append(replace(modules[module], layout=name, block_size=block_size, num_bytes=size))
    return Inventory(config, _merged(groups))


def assume_inventory(config: ModelConfig, fields: Mapping[str, Any]) -> Inventory:
    """The inventory that a bare config.json, of which `fields` are the contents, lets one expect.

    Raises:
        ConfigError: its quantization_config is not that of ModelOpt's NVFP4.
    """
    quantization = fields.get("quantization_config")
    algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else None
    if quantization is not None and algorithm != "NVFP4":
        raise ConfigError(
            f"config.json: field 'quantization_config' has quant_algo {algorithm!r}; without the tensors "
            "only 'NVFP4' (as nvidia/GLM-4.7-NVFP4) or none (BF16) is known: give the checkpoint directory"
        )
    groups = []
    for group in _modules(config).values():
        if quantization is not None and group.part in _NVFP4_PARTS and not group.is_draft:
            size = group.num_parameters * 9 // 16
            groups.append(replace(group, layout="ModelOpt NVFP4", block_size=16, num_bytes=size))
        else:
            groups.append(replace(group, num_bytes=2 * group.num_parameters))
    return Inventory(config, _merged(groups))


def _modules(config: ModelConfig) -> dict[str, Group]:
    """Each module of the model by name, with its parameters counted."""
    groups: dict[str, Group] = {}
    for parameter in all_parameters(config):
        module = parameter.name.rpartition(".")[0]
        group = groups.get(module) or _group_of(parameter, module, config)
        count = group.num_parameters + math.prod(parameter.shape)
        groups[module] = replace(group, num_parameters=count)
    return groups


def _group_of(parameter: Parameter, module: str, config: ModelConfig) -> Group:
    layer, _ = _split_name(module)
    part, shard = find_part(module), parameter.shard
    if part is None:
        raise ValueError(f"{module!r} is in no part of the model")
    is_draft = layer is not None and layer >= config.num_hidden_layers
    num_columns = parameter.shape[1] if shard and shard.axis == 1 else 0
    return Group(layer, is_draft, part, shard, num_columns)


def find_part(module: str) -> str | None:
    """The part of the model that a module belongs to; None if it is none of a GLM's modules."""
    _, name = _split_name(module)
    return next((part for pattern, part in _PARTS if re.fullmatch(pattern, name)), None)


def _split_name(module: str) -> tuple[int | None, str]:
    """Number of the layer, if it is in one, and the name below it."""
    match = re.fullmatch(r"(?:model\.)?(?:layers\.(\d+)\.)?(.+)", module)
    if match is None:
        return None, module
    return None if match[1] is None else int(match[1]), match[2]


def _merged(groups: Iterable[Group]) -> tuple[Group, ...]:
    parameters: Counter[Group] = Counter()
    sizes: Counter[Group] = Counter()
    for group in groups:
        kind = replace(group, num_parameters=0, num_bytes=0)
        parameters[kind] += group.num_parameters
        sizes[kind] += group.num_bytes
    return tuple(replace(k, num_parameters=parameters[k], num_bytes=sizes[k]) for k in sizes)


def distinct_experts(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Expected number of experts that are hit in a layer when each token picks `top_k` at random."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)


def _recast(group: Group, dtype: WeightDtype) -> Group:
    if dtype == "nvfp4":
        return replace(group, block_size=max(group.block_size, NVFP4.block_size or 1))
    if dtype == "bf16" and "FP" in group.layout:
        return replace(group, layout="BF16", num_bytes=group.num_parameters * 2)
    if dtype == "fp8" and "FP4" in group.layout:
        return replace(group, layout=FP8_PER_CHANNEL.name, num_bytes=group.num_parameters)
    return group


def _int8_bytes(group: Group, config: ModelConfig) -> int:
    as_matrix, as_floats = group.num_parameters * 17 // 16, group.num_parameters * 4
    if "FP4" in group.layout or "FP8" in group.layout:
        return group.num_bytes
    if group.part == EMBEDDING:  # which is the head, too, where they are tied
        return as_floats + as_matrix * config.tie_word_embeddings
    return as_floats if group.part in _FLOAT_PARTS else as_matrix


def read_share(group: Group, config: ModelConfig, batch: int, is_last: bool = True) -> float:
    """Share of a group's bytes that a step reads; of an embedding that is not the head too, a few rows."""
    if group.is_draft or (group.part == EMBEDDING and not (config.tie_word_embeddings and is_last)):
        return 0.0
    if group.part != EXPERTS:
        return 1.0
    experts = config.n_routed_experts
    return distinct_experts(experts, config.num_experts_per_tok, batch) / experts


def kv_layer_bytes(config: ModelConfig, num_kv_heads: int, dtype: KVDtype) -> int:
    """Bytes of keys and values of one token in one layer, of `num_kv_heads` heads."""
    return 2 * num_kv_heads * config.head_dim * KV_ITEM_BYTES[dtype]
