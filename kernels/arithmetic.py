"""How `ReferenceOps` multiplies, attends and applies functions: what may depend on the rest of a step.

torch promises no bits. A product of 4 rows adds up in another order than a product of 1, `silu` of the last
few numbers of a tensor takes another path than of those before, and attention is divided by its length. So a
token's numbers depend in their last bits on what else is in its step. `PlainArithmetic` leaves it at that;
`InvariantArithmetic` (invariant_arithmetic.py) does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Arithmetic(Protocol):
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, N]: x [T, K] times the transpose of weight [N, K], plus bias [N]."""

    def elementwise(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A function of single numbers, of each number of x."""

    def attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """softmax(q k / sqrt(D)) v of the last t positions of a context of n: [t, num_heads, D].

        query [t, num_heads, D]; keys, values [n, num_kv_heads, D], each serving num_heads / num_kv_heads
        consecutive query heads.
        """

    def by_rows(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """A function of tensors [S, ...] whose result [S, ...] is, but for its bits, one of each row."""


class PlainArithmetic:
    """torch's own operations."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def elementwise(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return function(x)

    def attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tokens, context = query.shape[0], keys.shape[0]
        mask = None
        if tokens > 1:
            ones = torch.ones(tokens, context, dtype=torch.bool, device=query.device)
            mask = ones.tril(diagonal=context - tokens)
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            enable_gqa=True,
        )
        return attended.squeeze(0).transpose(0, 1)

    def by_rows(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return function(*tensors)


PLAIN = PlainArithmetic()
