"""The operations on the native library, for hosts without a GPU.

Activations are float32. FP4 and FP8 weights stay what they are; of matrices that come as floats,
cpu_matrix.py says what becomes. What a token gives depends on nothing but itself, its context and the
weights: not on the rest of the step, on how its prompt is divided, or on the number of threads.

`ReferenceOps` does what is left: adjustments and log-probabilities of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from nybble.kernels.cpu import kv_cache_layout
from nybble.kernels.cpu.add import add
from nybble.kernels.cpu.add_rms_norm import add_rms_norm
from nybble.kernels.cpu.attention_input import attention_input
from nybble.kernels.cpu.cpu_matrix import CpuMatrix, FloatForm, prepare
from nybble.kernels.cpu.cpu_router import prepare_router
from nybble.kernels.cpu.feed_forward import FeedForward
from nybble.kernels.cpu.linear import linear
from nybble.kernels.cpu.paged_attention import paged_attention
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.rows import embed, rotary_angles
from nybble.kernels.cpu.sampling import sample
from nybble.kernels.cpu.weight_memory import WeightMemory
from nybble.kernels.logit_adjustments import LogitAdjustments
from nybble.kernels.ops import (
    AttentionBatch,
    AttentionWeights,
    DenseWeights,
    Embedding,
    KVCacheLayer,
    MoeWeights,
    RmsNorm,
    RotaryAngles,
    RouterWeights,
    SamplingBatch,
)
from nybble.kernels.quantized_tensor import QuantizedTensor
from nybble.kernels.reference_ops import ReferenceOps
from nybble.kernels.token_logprobs import Logprobs

R = TypeVar("R")


class CpuOps:
    """`Ops` whose weights are `CpuMatrix`. See `Ops` for every argument's shape."""

    def __init__(self, pool: Pool, float_form: FloatForm = "int8") -> None:
        """float_form: of matrices that come as floats."""
        self._pool = pool
        self._memory = WeightMemory()
        self._float_form: FloatForm = float_form
        self._feed_forward = FeedForward(pool)
        self._reference = ReferenceOps(torch.float32)

    def record(self, run: Callable[[], R]) -> Callable[[], R]:
        """Run a function of these operations, and return one that repeats them on the same addresses.

        Only what `CpuOps` does natively is repeated, which is everything up to `logits`. The result is always
        the first one's, with what the operations have written there since.
        """
        with self._pool.record() as recording:
            result = run()

        def replay() -> R:
            self._pool.replay(recording)
            return result

        return replay

    def prepare_weight(self, weight: Tensor | QuantizedTensor) -> CpuMatrix:
        return prepare(weight, self._float_form, self._pool, self._memory)

    def prepare_router(self, router: RouterWeights) -> RouterWeights:
        return prepare_router(router)

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCacheLayer:
        if device.type != "cpu":
            raise ValueError(f"a KV cache on {device}: the native CPU backend has it in host memory")
        return kv_cache_layout.new_kv_cache(num_blocks, block_size, num_kv_heads, head_dim, dtype)

    def embed(self, token_ids: Tensor, embedding: Embedding) -> Tensor:
        return embed(self._pool, token_ids, embedding)

    def rotary_angles(self, table: RotaryAngles, positions: Tensor) -> RotaryAngles:
        return rotary_angles(self._pool, table, positions)

    def attention_input(
        self,
        hidden: Tensor,
        update: Tensor | None,
        weights: AttentionWeights[CpuMatrix],
        angles: RotaryAngles,
        cache: KVCacheLayer,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return attention_input(self._pool, hidden, update, weights, angles, cache, slots)

    def paged_attention(self, query: Tensor, cache: KVCacheLayer, batch: AttentionBatch) -> Tensor:
        return paged_attention(self._pool, query, cache, batch)

    def attention_output(self, attended: Tensor, weights: AttentionWeights[CpuMatrix]) -> Tensor:
        return linear(self._pool, attended, weights.output)

    def dense_mlp(
        self, hidden: Tensor, update: Tensor | None, weights: DenseWeights[CpuMatrix]
    ) -> tuple[Tensor, Tensor]:
        return self._feed_forward.dense_mlp(hidden, update, weights)

    def moe(
        self, hidden: Tensor, update: Tensor | None, weights: MoeWeights[CpuMatrix]
    ) -> tuple[Tensor, Tensor]:
        return self._feed_forward.moe(hidden, update, weights)

    def logits(self, hidden: Tensor, norm: RmsNorm, head: CpuMatrix) -> Tensor:
        return linear(self._pool, self.rms_norm(hidden, norm), head)

    def add(self, hidden: Tensor, update: Tensor) -> Tensor:
        return add(self._pool, hidden, update)

    def rms_norm(self, x: Tensor, norm: RmsNorm) -> Tensor:
        return add_rms_norm(self._pool, x, None, norm)[1]

    def linear(self, x: Tensor, weight: CpuMatrix) -> Tensor:
        return linear(self._pool, x, weight)

    def adjust_logits(self, logits: Tensor, adjustments: LogitAdjustments) -> None:
        self._reference.adjust_logits(logits, adjustments)

    def token_logprobs(self, logits: Tensor, token_ids: Tensor, num_token_ids: int, num_top: int) -> Logprobs:
        return self._reference.token_logprobs(logits, token_ids, num_token_ids, num_top)

    def sample(self, logits: Tensor, batch: SamplingBatch, num_token_ids: int) -> Tensor:
        return sample(self._pool, logits, batch, num_token_ids)
