"""A layer of GLM-4.7 without data: enough to say what a step launches."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nybble.kernels.ops import (
    AttentionBatch,
    AttentionShape,
    AttentionWeights,
    DenseWeights,
    MlpWeights,
    MoeWeights,
    RmsNorm,
    RotaryAngles,
    RouterWeights,
)
from nybble.kernels.triton import activation_order
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.matmul import Matrix

META = torch.device("meta")
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, ROTARY, EXPERTS, TOP_K, NEURONS = 5120, 96, 8, 128, 64, 160, 8, 1536
SHAPE = AttentionShape(HEADS, KV_HEADS, HEAD_DIM, ROTARY)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def fp4(*shape: int, arch: int, block_size: int = 16) -> Fp4Matrix:
    *lead, rows, columns = shape
    width = activation_order.padded_width(columns)
    return Fp4Matrix(
        codes=empty(*lead, rows, width // 2, dtype=torch.uint8),
        scale_words=empty(*lead, -(-rows // 16), -(-width // 256), 1024 // block_size, dtype=torch.int32),
        row_scales=empty(*lead, rows, dtype=torch.float32),
        block_size=block_size,
        is_float16=arch >= 100,
        shape=shape,
    )


def norm(width: int) -> RmsNorm:
    return RmsNorm(empty(width), 1e-5)


def attention(arch: int) -> AttentionWeights[Matrix]:
    return AttentionWeights(
        shape=SHAPE,
        norm=norm(HIDDEN),
        qkv=fp4((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, arch=arch),
        qkv_bias=empty((HEADS + 2 * KV_HEADS) * HEAD_DIM),
        query_norm=norm(HEAD_DIM),
        key_norm=norm(HEAD_DIM),
        output=fp4(HIDDEN, HEADS * HEAD_DIM, arch=arch),
    )


def mlp(neurons: int, arch: int, *lead: int) -> MlpWeights[Matrix]:
    return MlpWeights(fp4(*lead, 2 * neurons, HIDDEN, arch=arch), fp4(*lead, HIDDEN, neurons, arch=arch))


def dense(arch: int) -> DenseWeights[Matrix]:
    return DenseWeights(norm(HIDDEN), mlp(12288, arch))


def moe(arch: int) -> MoeWeights[Matrix]:
    floats = torch.float32
    return MoeWeights(
        norm=norm(HIDDEN),
        router=RouterWeights(
            weight=empty(EXPERTS, HIDDEN, dtype=floats),
            bias=empty(EXPERTS, dtype=floats),
            top_k=TOP_K,
            num_groups=1,
            top_k_groups=1,
            normalize=True,
            scale=2.5,
        ),
        experts=mlp(NEURONS, arch, EXPERTS),
        shared_expert=mlp(NEURONS, arch),
    )


def without_shared_form(weights: MoeWeights[Matrix], arch: int) -> MoeWeights[Matrix]:
    """With a shared expert of another width, which can't ride with the routed ones."""
    return replace(weights, shared_expert=mlp(2 * NEURONS, arch))


def angles(num_tokens: int) -> RotaryAngles:
    return RotaryAngles(empty(num_tokens, ROTARY // 2), empty(num_tokens, ROTARY // 2))


def batch(*query_lengths: int, max_blocks: int = 3168) -> AttentionBatch:
    ints, num_sequences = torch.int32, len(query_lengths)
    return AttentionBatch(
        query_starts=empty(num_sequences + 1, dtype=ints),
        context_lengths=empty(num_sequences, dtype=ints),
        block_tables=empty(num_sequences, max_blocks, dtype=ints),
        slots=empty(sum(query_lengths), dtype=torch.int64),
        query_lengths=query_lengths,
    )
