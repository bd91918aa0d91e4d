"""The paged KV cache: its size, and its tensors.

In FP8 (E4M3) a key or value is stored over its layer's scale, and saturates at 448 times that scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from nybble.engine.checkpoint.kv_scales import KVScales
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.planning.inventory import KVDtype
from nybble.engine.planning.placement import Placement
from nybble.kernels.ops import KVCacheLayer, Ops, W

KV_TORCH_DTYPES: Mapping[KVDtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}


@dataclass(frozen=True, kw_only=True)
class CacheGeometry:
    """Shape of a rank's cache; a block holds the keys and values of `block_size` tokens in its layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int
    num_blocks: int

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        placement: Placement,
        dtype: torch.dtype,
        block_size: int,
        num_blocks: int = 0,
        with_draft: bool = False,
    ) -> CacheGeometry:
        """The cache of `num_blocks` blocks for what the rank at `placement` holds of `model`.

        The draft layer's, if it is wanted, is the last layer.
        """
        return cls(
            num_layers=len(placement.layers(model.num_hidden_layers)) + with_draft,
            num_kv_heads=len(placement.units(model.num_key_value_heads)),
            head_dim=model.head_dim,
            dtype=dtype,
            block_size=block_size,
            num_blocks=num_blocks,
        )

    @property
    def block_bytes(self) -> int:
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return per_token * self.block_size

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def allocate_kv_cache(
    geometry: CacheGeometry, ops: Ops[W], device: torch.device, scales: Sequence[KVScales] = ()
) -> tuple[KVCacheLayer, ...]:
    """One layer's keys and values for each layer, as the backend lays them out.

    scales: of each layer, for an FP8 cache; without them they are 1
    """
    layers = [_new_layer(geometry, ops, device) for _ in range(geometry.num_layers)]
    if geometry.dtype != torch.float8_e4m3fn or not scales:
        return tuple(layers)
    return tuple(_scaled(layer, scale, device) for layer, scale in zip(layers, scales, strict=True))


def _new_layer(geometry: CacheGeometry, ops: Ops[W], device: torch.device) -> KVCacheLayer:
    shape = geometry.num_blocks, geometry.block_size, geometry.num_kv_heads, geometry.head_dim
    return ops.new_kv_cache(*shape, geometry.dtype, device)


def _scaled(layer: KVCacheLayer, scales: KVScales, device: torch.device) -> KVCacheLayer:
    key, value = (torch.full((1,), scale, device=device) for scale in (scales.key, scales.value))
    return replace(layer, key_scale=key, value_scale=value)
