"""What a model consists of: its modules grouped by layer, part and layout, in parameters and bytes.

The recipes for a bare config leave out the 8 bytes of scales that a matrix has.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from nybble.engine.checkpoint import TensorEntry
from nybble.engine.errors import CheckpointError, ConfigError
from nybble.engine.layouts import find_layout
from nybble.engine.model_config import ModelConfig
from nybble.engine.parameters import Parameter, expected_parameters

KVDtype = Literal["bf16", "fp8"]
KV_ITEM_BYTES: dict[KVDtype, int] = {"bf16": 2, "fp8": 1}

# Module names below "model.layers.N.", the part that each belongs to, and among how many ranks of a stage it
# is divided: none, all, or as many as there are KV heads.
EXPERTS, EMBEDDING, HEAD = "routed experts", "embedding", "lm_head"
_PARTS = (
    (r"self_attn\.[qo]_proj", "attention", "all"),
    (r"self_attn\.[kv]_proj", "attention", "KV heads"),
    (r"self_attn\.[qk]_norm", "attention", "none"),
    (r"mlp\.(gate|up|down)_proj", "dense MLP", "all"),
    (r"mlp\.experts\.\d+\.\w+", EXPERTS, "all"),
    (r"mlp\.shared_experts\.\w+", "shared experts", "all"),
    (r"mlp\.gate", "router", "none"),
    (r"embed_tokens", EMBEDDING, "all"),
    (r"lm_head|shared_head\.head", HEAD, "all"),
    (r"\w*norm|shared_head\.norm", "norms", "none"),
    (r"eh_proj", "draft projection", "none"),
)
DRAFT, DRAFT_COPIES = "draft layer", "draft copies, not loaded"
_ROWS = tuple(dict.fromkeys([*(part for _, part, _ in _PARTS), DRAFT, DRAFT_COPIES]))
# nvidia/GLM-4.7-NVFP4: these in NVFP4 (half a byte of code, a byte of scale for 16), everything else in BF16.
_NVFP4_PARTS = frozenset({"dense MLP", EXPERTS, "shared experts"})


@dataclass(frozen=True)
class Group:
    """Modules that are alike. `layer` is None outside of the layers; `block_size` is 1 without blocks."""

    layer: int | None
    is_draft: bool
    part: str
    divided_among: str
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
    num_parameters = _parameters_by_module(config)
    num_bytes: Counter[str] = Counter()
    for entry in entries.values():
        num_bytes[entry.name.rpartition(".")[0]] += entry.num_bytes
    groups = []
    for module, size in num_bytes.items():
        layout = find_layout(module, entries)
        name = entries[f"{module}.weight"].dtype if layout.format is None else layout.name
        block_size = (layout.format.block_size if layout.format else None) or 1
        group = replace(_classify(module, config), layout=name, block_size=block_size, num_bytes=size)
        groups.append(replace(group, num_parameters=num_parameters[module]))
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
    for module, count in _parameters_by_module(config).items():
        group = replace(_classify(module, config), num_parameters=count, num_bytes=2 * count)
        if quantization is not None and group.part in _NVFP4_PARTS and not group.is_draft:
            group = replace(group, layout="ModelOpt NVFP4", block_size=16, num_bytes=count * 9 // 16)
        groups.append(group)
    return Inventory(config, _merged(groups))


def _parameters_by_module(config: ModelConfig) -> Counter[str]:
    counts: Counter[str] = Counter()
    for parameter in _all_parameters(config):
        counts[parameter.name.rpartition(".")[0]] += math.prod(parameter.shape)
    return counts


def _all_parameters(config: ModelConfig) -> Iterator[Parameter]:
    """With the draft layers: a decoder layer each, preceded by a projection and followed by a head."""
    first, hidden = config.num_hidden_layers, config.hidden_size
    last = first + config.num_nextn_predict_layers
    yield from expected_parameters(replace(config, num_hidden_layers=last))
    for layer in range(first, last):
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield Parameter(f"model.layers.{layer}.{name}.weight", (hidden,))
        yield Parameter(f"model.layers.{layer}.eh_proj.weight", (hidden, 2 * hidden))
        for name in ("embed_tokens", "shared_head.head"):
            yield Parameter(f"model.layers.{layer}.{name}.weight", (config.vocab_size, hidden))


def find_part(module: str) -> str | None:
    """The part of the model that a module belongs to; None if it is none of a GLM's modules."""
    _, name = _split_name(module)
    return next((part for pattern, part, _ in _PARTS if re.fullmatch(pattern, name)), None)


def _split_name(module: str) -> tuple[int | None, str]:
    """Number of the layer, if it is in one, and the name below it."""
    match = re.fullmatch(r"(?:model\.)?(?:layers\.(\d+)\.)?(.+)", module)
    if match is None:
        return None, module
    return None if match[1] is None else int(match[1]), match[2]


def _classify(module: str, config: ModelConfig) -> Group:
    layer, name = _split_name(module)
    for pattern, part, divided_among in _PARTS:
        if re.fullmatch(pattern, name):
            return Group(layer, (layer or 0) >= config.num_hidden_layers, part, divided_among)
    raise CheckpointError(f"the model has no place for tensors of {module!r}")


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
