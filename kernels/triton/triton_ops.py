"""`Ops` as Triton kernels.

Activations that feed a matrix lie in fragment order (`activation_order`), padded with zeros to whole blocks
of 64 columns; matrices of other formats than FP4 are permuted to match when they are prepared. Hidden states,
queries and logits are in natural order. A decode step launches 11 kernels a sparse layer:

    attention_input     residual + norm; q/k/v projection; bias + head norms + rotation + cache
    paged_attention     parts of the context; their merge
    attention_output    output projection
    moe                 residual + norm; router logits; choice; gate + up + SiLU; down (shared expert
    included)

What has no kernel of its own is torch's: products with bfloat16 matrices (cuBLAS), and experts in other
formats than FP4, one by one. Nothing else waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.logit_adjustments import LogitAdjustments
from nybble.kernels.ops import (
    AttentionBatch,
    AttentionShape,
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
from nybble.kernels.token_logprobs import Logprobs
from nybble.kernels.triton import activation_order
from nybble.kernels.triton.attention import MAX_ROWS, decode_launch, paged_decode_attention
from nybble.kernels.triton.embedding import embed, embedding_launch
from nybble.kernels.triton.experts import mlp, moe_experts
from nybble.kernels.triton.kv_cache_layout import new_head_major
from nybble.kernels.triton.launch_choice import LaunchChoice
from nybble.kernels.triton.launch_policy import ADAPTIVE, LaunchPolicy
from nybble.kernels.triton.launch_table import LaunchTable
from nybble.kernels.triton.logit_adjustments import adjust_logits, adjustment_launch
from nybble.kernels.triton.matmul import Matrix, linear, operand_dtype, prepare_matrix
from nybble.kernels.triton.norm import residual_rms_norm
from nybble.kernels.triton.prefill_attention import paged_prefill_attention, prefill_launch
from nybble.kernels.triton.qkv import qkv_launch, store_qkv
from nybble.kernels.triton.router import router_launch, routing
from nybble.kernels.triton.row import row_launch
from nybble.kernels.triton.sampling import sample, sampling_launch
from nybble.kernels.triton.token_logprobs import logprobs_launch, token_logprobs

# Query tokens up to which a sequence counts as decoding: one, and as many as are drafted for it.
_MOST_DECODED = 8


class TritonOps:
    """`Ops` whose weights are `Matrix`. See `Ops` for every argument's shape.

    arch: compute capability times ten of the GPU, rounded down to one that kernels are tuned for: 80, 90,
    100, 120. policy: whether a token's last bits may depend on the rest of its step; table: launch
    configurations that were measured on this GPU.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        arch: int,
        policy: LaunchPolicy = ADAPTIVE,
        table: LaunchTable | None = None,
    ) -> None:
        self.dtype = dtype
        self.arch = arch
        self._choice = LaunchChoice(arch, policy, table or LaunchTable())

    def prepare_weight(self, weight: Tensor | QuantizedTensor) -> Matrix:
        return prepare_matrix(weight, self.dtype, self.arch)

    def prepare_router(self, router: RouterWeights) -> RouterWeights:
        width = router.weight.shape[1]
        padded = F.pad(router.weight, (0, activation_order.padded_width(width) - width))
        return replace(router, weight=activation_order.to_fragment_order(padded))

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCacheLayer:
        """keys, values: see `kv_cache_layout`."""
        cache = new_head_major(num_blocks, num_kv_heads, block_size, head_dim, dtype, device)
        one = torch.ones(1, device=device)
        return replace(cache, key_scale=one, value_scale=one)

    def embed(self, token_ids: Tensor, embedding: Embedding) -> Tensor:
        return embed(token_ids, embedding, launch=embedding_launch(embedding.table.shape[1], self.arch))

    def rotary_angles(self, table: RotaryAngles, positions: Tensor) -> RotaryAngles:
        return table.at(positions, self.dtype)

    def attention_input(
        self,
        hidden: Tensor,
        update: Tensor | None,
        weights: AttentionWeights[Matrix],
        angles: RotaryAngles,
        cache: KVCacheLayer,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        hidden, x = self._normed(hidden, update, weights.norm, weights.qkv)
        qkv = linear(x, weights.qkv, self.dtype, self._choice)
        query = store_qkv(
            qkv,
            weights.qkv_bias,
            weights.shape,
            weights.query_norm,
            weights.key_norm,
            angles,
            cache.keys,
            cache.values,
            slots,
            key_scale=cache.key_scale,
            value_scale=cache.value_scale,
            values_transposed=True,
            launch=qkv_launch(
                self._choice.tokens(len(x)), weights.shape, self.arch, cache_dtype=cache.keys.dtype
            ),
        )
        return hidden, query

    def paged_attention(self, query: Tensor, cache: KVCacheLayer, batch: AttentionBatch) -> Tensor:
        """In fragment order, for the output projection."""
        num_tokens, num_heads, head_dim = query.shape
        width = num_heads * head_dim
        padded = activation_order.padded_width(width)
        make = torch.empty if padded == width else torch.zeros
        output = make(num_tokens, padded, dtype=self.dtype, device=query.device)
        shape = AttentionShape(num_heads, cache.keys.shape[1], head_dim, rotary_dim=0)
        first = 0
        for is_short, lengths in groupby(batch.query_lengths, lambda n: self._is_decoded(n, shape)):
            count, longest = _count_and_longest(lengths)
            part = slice(first, first + count)
            self._attend(query, cache, batch, part, longest if is_short else None, shape, output)
            first += count
        return output

    def attention_output(self, attended: Tensor, weights: AttentionWeights[Matrix]) -> Tensor:
        return linear(attended, weights.output, self.dtype, self._choice)

    def dense_mlp(
        self, hidden: Tensor, update: Tensor | None, weights: DenseWeights[Matrix]
    ) -> tuple[Tensor, Tensor]:
        hidden, x = self._normed(hidden, update, weights.norm, weights.mlp.gate_up)
        return hidden, mlp(x, weights.mlp, self.dtype, self._choice)

    def moe(
        self, hidden: Tensor, update: Tensor | None, weights: MoeWeights[Matrix]
    ) -> tuple[Tensor, Tensor]:
        hidden, x = self._normed(hidden, update, weights.norm, weights.experts.gate_up)
        num_tokens, num_experts = self._choice.tokens(len(x)), len(weights.router.bias)
        launch = router_launch(num_tokens, num_experts, x.shape[1], x.dtype, self.arch)
        routed = routing(x, weights.router, launch=launch)
        return hidden, moe_experts(x, routed, weights, self.dtype, self._choice)

    def add(self, hidden: Tensor, update: Tensor) -> Tensor:
        return hidden + update

    def logits(self, hidden: Tensor, norm: RmsNorm, head: Matrix) -> Tensor:
        _, x = self._normed(hidden, None, norm, head)
        return linear(x, head, torch.float32, self._choice)

    def rms_norm(self, x: Tensor, norm: RmsNorm) -> Tensor:
        width = activation_order.padded_width(x.shape[1])
        _, normed = residual_rms_norm(
            x,
            None,
            norm,
            fragment_order=False,
            padded_width=width,
            dtype=self.dtype,
            launch=row_launch(width, self.arch),
        )
        return normed[:, : x.shape[1]]

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        padded = F.pad(x, (0, weight.width - x.shape[1])).to(operand_dtype(weight, self.dtype))
        return linear(activation_order.to_fragment_order(padded), weight, self.dtype, self._choice)

    def adjust_logits(self, logits: Tensor, adjustments: LogitAdjustments) -> None:
        adjust_logits(logits, adjustments, launch=adjustment_launch(logits.shape[1], self.arch))

    def token_logprobs(self, logits: Tensor, token_ids: Tensor, num_token_ids: int, num_top: int) -> Logprobs:
        launch = logprobs_launch(logits.shape[1], self.arch)
        return token_logprobs(logits, token_ids, num_token_ids, num_top, launch=launch)

    def sample(self, logits: Tensor, batch: SamplingBatch, num_token_ids: int) -> Tensor:
        return sample(logits, batch, num_token_ids, launch=sampling_launch(logits.shape[1], self.arch))

    def _normed(
        self, hidden: Tensor, update: Tensor | None, norm: RmsNorm, matrix: Matrix
    ) -> tuple[Tensor, Tensor]:
        """hidden + update, and its norm as `matrix` wants it."""
        return residual_rms_norm(
            hidden,
            update,
            norm,
            fragment_order=True,
            padded_width=matrix.width,
            dtype=operand_dtype(matrix, self.dtype),
            launch=row_launch(matrix.width, self.arch),
        )

    def _is_decoded(self, length: int, shape: AttentionShape) -> bool:
        """Whether so many tokens of a sequence are for the kernel that divides its context among programs."""
        group = shape.num_heads // shape.num_kv_heads
        is_short = length <= _MOST_DECODED and length * group <= MAX_ROWS
        return is_short and not self._choice.policy.is_invariant

    def _attend(
        self,
        query: Tensor,
        cache: KVCacheLayer,
        batch: AttentionBatch,
        part: slice,
        max_query_len: int | None,
        shape: AttentionShape,
        output: Tensor,
    ) -> None:
        """Attention of some sequences of the batch; max_query_len is None for those with many tokens."""
        tables = batch.block_tables[part]
        block_size, cache_dtype = cache.keys.shape[2], cache.keys.dtype
        starts = batch.query_starts[part.start : part.stop + 1]
        inputs = query, cache.keys, cache.values, tables, batch.context_lengths[part], starts
        scales = {
            "scale": shape.head_dim**-0.5,
            "key_scale": cache.key_scale,
            "value_scale": cache.value_scale,
        }
        if max_query_len is None:
            prefill = prefill_launch(shape, self.arch, block_size=block_size, cache_dtype=cache_dtype)
            paged_prefill_attention(*inputs, **scales, output=output, fragment_order=True, launch=prefill)
            return
        decode = decode_launch(
            shape,
            self.arch,
            num_sequences=len(tables),
            max_query_len=max_query_len,
            max_context=tables.shape[1] * block_size,
            block_size=block_size,
            cache_dtype=cache_dtype,
        )
        paged_decode_attention(
            *inputs,
            **scales,
            output=output,
            max_query_len=max_query_len,
            fragment_order=True,
            launch=decode,
        )


def _count_and_longest(lengths: Iterable[int]) -> tuple[int, int]:
    listed = list(lengths)
    return len(listed), max(listed)
