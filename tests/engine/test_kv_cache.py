from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nybble.engine.kv_cache import CacheGeometry, allocate_kv_cache

GLM_4_7 = CacheGeometry(
    num_layers=92, num_kv_heads=8, head_dim=128, item_bytes=2, block_size=16, num_blocks=12_672
)
TINY = CacheGeometry(num_layers=3, num_kv_heads=2, head_dim=8, item_bytes=4, block_size=4, num_blocks=5)


def test_glm_4_7_has_its_known_size() -> None:
    assert GLM_4_7.block_bytes == 16 * 376_832
    assert round(GLM_4_7.num_bytes / 2**30, 2) == 71.16  # 202,752 tokens in BF16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_take_the_bytes_that_were_planned(dtype: torch.dtype) -> None:
    geometry = replace(TINY, item_bytes=dtype.itemsize)
    layers = allocate_kv_cache(geometry, dtype, torch.device("cpu"))
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    assert len(layers) == 3
    assert {(tensor.dtype, tuple(tensor.shape)) for tensor in tensors} == {(dtype, (5, 4, 2, 8))}
    assert sum(tensor.nbytes for tensor in tensors) == geometry.num_bytes


def test_no_two_tensors_share_memory() -> None:
    layers = allocate_kv_cache(TINY, torch.float32, torch.device("cpu"))
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in tensors] == [[n] for n in range(6)]
    assert all(tensor.is_contiguous() for tensor in tensors)
