from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nybble.engine.checkpoint.kv_scales import KVScales
from nybble.engine.checkpoint.model_config import ModelConfig, read_json_object
from nybble.engine.model.kv_cache import KV_TORCH_DTYPES, CacheGeometry, allocate_kv_cache
from nybble.engine.planning.placement import Placement, Split
from nybble.kernels.reference_ops import ReferenceOps

MODEL = ModelConfig.from_fields(read_json_object(Path(__file__).parents[1] / "data" / "glm-4.7-config.json"))
GLM_4_7 = CacheGeometry(
    num_layers=92, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, block_size=16, num_blocks=12_672
)
TINY = CacheGeometry(
    num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32, block_size=4, num_blocks=5
)


def test_glm_4_7_has_its_known_size() -> None:
    assert GLM_4_7.block_bytes == 16 * 376_832
    assert round(GLM_4_7.num_bytes / 2**30, 2) == 71.16  # 202,752 tokens in BF16


@pytest.mark.parametrize("dtype", KV_TORCH_DTYPES.values(), ids=str)
def test_tensors_take_the_bytes_that_were_planned(dtype: torch.dtype) -> None:
    geometry = replace(TINY, dtype=dtype)
    layers = allocate_kv_cache(geometry, ReferenceOps(torch.float32), torch.device("cpu"))
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    assert len(layers) == 3
    assert {(tensor.dtype, tuple(tensor.shape)) for tensor in tensors} == {(dtype, (5, 4, 2, 8))}
    assert sum(tensor.nbytes for tensor in tensors) == geometry.num_bytes


def test_fp8_takes_half_of_bf16() -> None:
    assert replace(GLM_4_7, dtype=torch.float8_e4m3fn).num_bytes * 2 == GLM_4_7.num_bytes


def test_an_fp8_cache_has_the_scales_of_its_layers() -> None:
    scales = [KVScales(0.5, 2.0), KVScales(), KVScales(3.0, 0.25)]
    geometry, cpu = replace(TINY, dtype=torch.float8_e4m3fn), torch.device("cpu")
    layers = allocate_kv_cache(geometry, ReferenceOps(torch.float32), cpu, scales)
    assert [(layer.key_scale, layer.value_scale) for layer in layers] == [(0.5, 2.0), (1.0, 1.0), (3.0, 0.25)]
    unscaled = allocate_kv_cache(TINY, ReferenceOps(torch.float32), cpu, scales)
    assert all(layer.key_scale is None and layer.value_scale is None for layer in unscaled)


def test_no_two_tensors_share_memory() -> None:
    layers = allocate_kv_cache(TINY, ReferenceOps(torch.float32), torch.device("cpu"))
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in tensors] == [[n] for n in range(6)]
    assert all(tensor.is_contiguous() for tensor in tensors)


@pytest.mark.parametrize(
    ("split", "rank", "num_layers", "num_kv_heads"),
    [
        (Split(), 0, 92, 8),
        (Split(8, 1, 1), 3, 92, 1),
        (Split(8, 8, 1), 3, 92, 1),
        (Split(16, 1, 1), 15, 92, 1),  # two ranks hold each KV head
        (Split(1, 1, 3), 0, 31, 8),
        (Split(1, 1, 3), 2, 30, 8),
        (Split(4, 1, 3), 11, 30, 2),
    ],
    ids=str,
)
def test_a_rank_caches_its_layers_and_heads(
    split: Split, rank: int, num_layers: int, num_kv_heads: int
) -> None:
    geometry = CacheGeometry.of(MODEL, Placement(split, rank), torch.bfloat16, block_size=16, num_blocks=7)
    assert geometry == replace(GLM_4_7, num_layers=num_layers, num_kv_heads=num_kv_heads, num_blocks=7)
    ops = ReferenceOps(torch.bfloat16)
    layers = allocate_kv_cache(replace(geometry, block_size=1), ops, torch.device("cpu"))
    assert len(layers) == num_layers
    assert layers[-1].values.shape == (7, 1, num_kv_heads, 128)


def test_ranks_together_cache_every_head_of_every_layer_once() -> None:
    split = Split(4, 1, 3)
    ranks = [CacheGeometry.of(MODEL, Placement(split, rank), torch.bfloat16, 16, 1) for rank in range(12)]
    assert sum(rank.block_bytes for rank in ranks) == GLM_4_7.block_bytes
