"""The paged KV cache: its size, and its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.engine.model_config import ModelConfig
from nybble.engine.placement import Placement
from nybble.kernels.ops import KVCacheLayer, Ops, W


@dataclass(frozen=True, kw_only=True)
class CacheGeometry:
    """Shape of a rank's cache; a block holds the keys and values of `block_size` tokens in its layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    item_bytes: int
    block_size: int
    num_blocks: int

    @classmethod
    def of(
        cls, model: ModelConfig, placement: Placement, item_bytes: int, block_size: int, num_blocks: int = 0
    ) -> CacheGeometry:
        """The cache of `num_blocks` blocks for what the rank at `placement` holds of `model`."""
        return cls(
            num_layers=len(placement.layers(model.num_hidden_layers)),
            num_kv_heads=len(placement.units(model.num_key_value_heads)),
            head_dim=model.head_dim,
            item_bytes=item_bytes,
            block_size=block_size,
            num_blocks=num_blocks,
        )

    @property
    def block_bytes(self) -> int:
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.item_bytes
        return per_token * self.block_size

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def allocate_kv_cache(geometry: CacheGeometry, ops: Ops[W], device: torch.device) -> tuple[KVCacheLayer, ...]:
    """One layer's keys and values for each layer, as the backend lays them out."""
    return tuple(
        ops.new_kv_cache(
            geometry.num_blocks, geometry.block_size, geometry.num_kv_heads, geometry.head_dim, device
        )
        for _ in range(geometry.num_layers)
    )
