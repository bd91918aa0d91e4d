"""The router: float32 logits of every expert, and each token's choice among them.

Two launches. The first multiplies. For a few tokens all that counts is to read the weights: programs are
small, load their whole tile at once, and add up with float32 instructions. Many tokens take matrix
instructions, in which float32 weights stay exact: a float32 has 24 bits, a bfloat16 has 8, so a weight is the
sum of three bfloat16, and a product of two bfloat16 is exact in float32. Activations of other dtypes take
float32 instructions there, too.

Both cut the width into splits, to occupy the chip. The second launch adds up their sums in order and chooses,
one warp for a token, so that nothing waits at a barrier. The largest of a warp's integers is found by one
instruction (`redux`), of floats by ten: so choices become int32 keys of the same order, and each of the top_k
rounds takes three such instructions. NaN counts as the largest choice. Whatever the logits, a token's ids are
distinct and name experts.

Columns of x and weight may stand in any order, the same in both, and may be padded with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.ops import RouterWeights, Routing
from nybble.kernels.triton.launch import launch as launch_kernel

_MOST_FEW_TOKENS = 8
_MOST_SPLITS = 20  # the second launch loads as many sums for each logit
_PROGRAMS = 132  # about one for each multiprocessor


@dataclass(frozen=True)
class RouterLaunch:
    """A program's tile of tokens x experts x columns, and the columns of a split.

    With has_matrix_tiles a split is several tiles wide, else as wide as one.
    """

    block_tokens: int
    block_experts: int
    block_width: int
    split_width: int
    has_matrix_tiles: bool
    num_warps: int
    num_stages: int


def router_launch(
    num_tokens: int, num_experts: int, width: int, dtype: torch.dtype, arch: int
) -> RouterLaunch:
    """For logits [num_tokens, num_experts] of x [num_tokens, width] of `dtype`."""
    is_few = num_tokens <= _MOST_FEW_TOKENS
    tile = _vector_tile(num_tokens, width) if is_few else _matrix_tile(num_tokens, dtype, arch)
    block_tokens, block_experts, block_width = tile
    tiles = triton.cdiv(num_tokens, block_tokens) * triton.cdiv(num_experts, block_experts)
    splits = min(_MOST_SPLITS, max(1, _PROGRAMS // max(1, tiles)))
    steps = 1 if is_few else triton.cdiv(triton.cdiv(width, block_width), splits)
    return RouterLaunch(
        *tile,
        split_width=steps * block_width,
        has_matrix_tiles=not is_few,
        num_warps=4,
        num_stages=4,
    )


def _vector_tile(num_tokens: int, width: int) -> tuple[int, int, int]:
    """Tokens, experts and columns, such that a thread loads 64 bytes of weights, all at once."""
    return triton.next_power_of_2(max(1, num_tokens)), 4, min(512, triton.next_power_of_2(width))


def _matrix_tile(num_tokens: int, dtype: torch.dtype, arch: int) -> tuple[int, int, int]:
    """Tokens, experts and columns, such that nothing is spilled."""
    if dtype != torch.bfloat16:
        return 16, 32, 64
    if num_tokens <= 32:
        return triton.next_power_of_2(num_tokens), 64, 64
    # Experts are the 64 rows of a warp group's matrix instruction: from 9.0 on more tokens fit beside them.
    return (128 if arch in (90, 100) and num_tokens >= 8192 else 64), 64, 32


def routing(x: Tensor, router: RouterWeights, *, launch: RouterLaunch) -> Routing:
    """The experts of each row of x [T, K]; of `router` the weight is [E, K]. ids are int32."""
    return router_choice(router_logits(x, router.weight, launch=launch), router)


def router_logits(x: Tensor, weight: Tensor, *, launch: RouterLaunch) -> Tensor:
    """float32 [splits, T, E], which added up over the splits are x weight^T.

    x: [T, K]; weight: float32 [E, K]. Rows of both may lie apart.
    """
    (num_tokens, width), num_experts = x.shape, weight.shape[0]
    num_splits = triton.cdiv(width, launch.split_width)
    logits = torch.empty(num_splits, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    expert_tiles = triton.cdiv(num_experts, launch.block_experts)
    token_tiles = triton.cdiv(num_tokens, launch.block_tokens)
    launch_kernel(
        _matrix_logits_kernel if launch.has_matrix_tiles else _vector_logits_kernel,
        (expert_tiles, token_tiles, num_splits),
        *(x, weight, logits, num_tokens, num_experts, width, launch.split_width),
        *(x.stride(0), weight.stride(0)),
        BLOCK_T=launch.block_tokens,
        BLOCK_E=launch.block_experts,
        BLOCK_K=launch.block_width,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return logits


def router_choice(logits: Tensor, router: RouterWeights) -> Routing:
    """Of float32 logits [splits, T, E], to be added up: ids int32 and weights float32 [T, top_k].

    Of equal choices the lower id is taken. A group has two experts or more.
    """
    num_splits, num_tokens, num_experts = logits.shape
    ids = torch.empty(num_tokens, router.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, router.top_k, dtype=torch.float32, device=logits.device)
    launch_kernel(
        _router_choice_kernel,
        (num_tokens,),
        *(logits, router.bias, ids, weights, num_tokens, num_experts, router.scale),
        NUM_SPLITS=num_splits,
        NUM_GROUPS=router.num_groups,
        TOP_K_GROUPS=router.top_k_groups,
        TOP_K=router.top_k,
        NORMALIZE=router.normalize,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_TOP_K=triton.next_power_of_2(router.top_k),
        num_warps=1,
    )
    return Routing(ids, weights)


# Logits.


@triton.jit
def _vector_logits_kernel(
    x_ptr,
    weight_ptr,
    logits_ptr,
    num_tokens,
    num_experts,
    width,
    split_width,
    x_stride,
    weight_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (experts, tokens, split): one tile [token, expert, column], as wide as the split."""
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :, None]
    split = tl.program_id(2)
    k = split * split_width + tl.arange(0, BLOCK_K)[None, None, :]
    is_token, is_expert, is_column = token < num_tokens, expert < num_experts, k < width
    w = tl.load(weight_ptr + expert * weight_stride + k, mask=is_expert & is_column, other=0.0)
    row = tl.load(x_ptr + token * x_stride + k, mask=is_token & is_column, other=0.0)
    sums = tl.sum(row.to(tl.float32) * w, axis=2, keep_dims=True)
    at = (split * num_tokens + token) * num_experts + expert
    tl.store(logits_ptr + at, sums, mask=is_token & is_expert)


@triton.jit
def _matrix_logits_kernel(
    x_ptr,
    weight_ptr,
    logits_ptr,
    num_tokens,
    num_experts,
    width,
    split_width,
    x_stride,
    weight_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (experts, tokens, split): weights are the left operand, so that they are split in registers."""
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    first = split * split_width
    is_expert, is_token = expert < num_experts, token < num_tokens
    weight_rows = weight_ptr + expert[:, None] * weight_stride
    x_rows = x_ptr + token[:, None].to(tl.int64) * x_stride
    sums = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    for first_column in range(first, min(first + split_width, width), BLOCK_K):
        k = first_column + tl.arange(0, BLOCK_K)
        is_column = (k < width)[None, :]
        w = tl.load(weight_rows + k[None, :], mask=is_expert[:, None] & is_column, other=0.0)
        rows = tl.load(x_rows + k[None, :], mask=is_token[:, None] & is_column, other=0.0)
        sums = _add_product(sums, w, rows)
    at = (split * num_tokens + token)[None, :] * num_experts + expert[:, None]
    tl.store(logits_ptr + at, sums, mask=is_expert[:, None] & is_token[None, :])


@triton.jit
def _add_product(sums, w, rows):
    """sums [E, T] + w [E, K] rows [T, K]^T, as exact as float32."""
    if rows.dtype == tl.bfloat16:
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(low, rows.T, sums)
        sums = tl.dot(middle, rows.T, sums)
        return tl.dot(high, rows.T, sums)
    else:
        return tl.dot(w, rows.to(tl.float32).T, sums, input_precision="ieee")


# Choice.


@triton.jit
def _router_choice_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    num_tokens,
    num_experts,
    scale,
    NUM_SPLITS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_K_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
):
    """Program: one token."""
    token = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    is_expert = expert < num_experts
    logit = tl.zeros([BLOCK_E], tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        row = logits_ptr + (split * num_tokens + token) * num_experts
        logit += tl.load(row + expert, mask=is_expert, other=0.0)
    score = tl.sigmoid(logit)
    choice = score + tl.load(bias_ptr + expert, mask=is_expert, other=0.0)
    if TOP_K_GROUPS < NUM_GROUPS:
        group_size = num_experts // NUM_GROUPS
        choice = _mask_weak_groups(choice, expert, is_expert, group_size, NUM_GROUPS, TOP_K_GROUPS)
    keys = tl.where(is_expert, _ordered_key(choice), _least_key())
    # A score is not negative: only a NaN can have the sign that is dropped. Then its bits are in its order.
    score_bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    rank = tl.arange(0, BLOCK_TOP_K)
    chosen = tl.zeros([BLOCK_TOP_K], tl.int32)
    chosen_bits = tl.zeros([BLOCK_TOP_K], tl.int32)
    for r in tl.static_range(TOP_K):
        _, best = _best(keys, expert)
        chosen = tl.where(rank == r, best, chosen)
        chosen_bits = tl.where(
            rank == r, tl.max(tl.where(expert == best, score_bits, 0), axis=0), chosen_bits
        )
        keys = tl.where(expert == best, _least_key(), keys)
    weight = chosen_bits.to(tl.float32, bitcast=True)
    if NORMALIZE:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)
    is_rank = rank < TOP_K
    tl.store(ids_ptr + token * TOP_K + rank, chosen, mask=is_rank)
    tl.store(weights_ptr + token * TOP_K + rank, weight * scale, mask=is_rank)


@triton.jit
def _mask_weak_groups(
    choice, expert, is_expert, group_size, NUM_GROUPS: tl.constexpr, TOP_K_GROUPS: tl.constexpr
):
    """choice [E], with -inf outside the groups whose two best entries sum highest."""
    group = expert // group_size
    keys = _ordered_key(choice)
    strength = tl.zeros_like(choice)
    for g in tl.static_range(NUM_GROUPS):
        members = tl.where(group == g, keys, _least_key())
        first, best = _best(members, expert)
        second = tl.max(tl.where(expert == best, _least_key(), members), axis=0)
        strength = tl.where(group == g, _ordered_value(first) + _ordered_value(second), strength)
    strengths = tl.where(is_expert, _ordered_key(strength), _least_key())
    is_kept = tl.zeros_like(is_expert)
    for _ in tl.static_range(TOP_K_GROUPS):
        _, best = _best(strengths, expert)
        is_best = group == best // group_size
        is_kept |= is_best
        strengths = tl.where(is_best, _least_key(), strengths)
    return tl.where(is_kept, choice, float("-inf"))


@triton.jit
def _best(keys, expert):
    """The largest of keys [E] and the lowest id that has it."""
    best = tl.max(keys, axis=0)
    return best, tl.min(tl.where(keys == best, expert, 0x7FFFFFFF), axis=0)


@triton.jit
def _least_key():
    """Of what is no choice, or no more. It is the key of no number."""
    return -0x80000000


@triton.jit
def _ordered_key(value):
    """int32 in the order of float32 `value`; NaN counts as infinity."""
    bits = tl.where(value == value, value, float("inf")).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ordered_value(key):
    """The inverse of `_ordered_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
