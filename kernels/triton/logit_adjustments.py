"""`logit_adjustments` in at most two launches: one for what is listed token by token, one for the mask."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.logit_adjustments import LogitAdjustments, LogitBias, Penalties
from nybble.kernels.triton.launch import launch as launch_kernel

_WORD = tl.constexpr(32)


@dataclass(frozen=True)
class AdjustmentLaunch:
    """tokens: listed tokens in a step of a row's program; words: mask words of a program. Powers of two."""

    tokens: int
    tokens_warps: int
    words: int
    words_warps: int


def adjustment_launch(num_columns: int, arch: int) -> AdjustmentLaunch:
    """The same on every architecture: a row's list is one program's, and short beside its logits."""
    words = min(64, triton.next_power_of_2(triton.cdiv(num_columns, _WORD.value)))
    return AdjustmentLaunch(tokens=1024, tokens_warps=8, words=words, words_warps=max(1, words // 8))


def adjust_logits(logits: Tensor, adjustments: LogitAdjustments, *, launch: AdjustmentLaunch) -> None:
    """Adjust logits, float32 [S, V], in place. Rows may lie at any distance; columns are adjacent."""
    num_rows, num_columns = logits.shape
    if adjustments.bias is not None or adjustments.penalties is not None:
        launch_kernel(
            _listed_tokens_kernel,
            (num_rows,),
            logits,
            logits.stride(0),
            *_bias_columns(adjustments.bias),
            *_penalty_columns(adjustments.penalties),
            TOKENS=launch.tokens,
            num_warps=launch.tokens_warps,
        )
    allowed = adjustments.allowed
    if allowed is not None:
        launch_kernel(
            _mask_kernel,
            (triton.cdiv(allowed.shape[1], launch.words), num_rows),
            logits,
            logits.stride(0),
            num_columns,
            allowed,
            allowed.stride(0),
            allowed.shape[1],
            WORDS=launch.words,
            num_warps=launch.words_warps,
        )


def _bias_columns(bias: LogitBias | None) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if bias is None else (bias.row_starts, bias.token_ids, bias.values)


def _penalty_columns(penalties: Penalties | None) -> tuple[Tensor | None, ...]:
    if penalties is None:
        return (None,) * 6
    listed = (penalties.row_starts, penalties.token_ids, penalties.output_counts)
    return (*listed, penalties.repetition, penalties.frequency, penalties.presence)


@triton.jit
def _listed_tokens_kernel(
    logits, row_stride,
    bias_starts, bias_ids, bias_values,
    penalty_starts, penalty_ids, output_counts, repetitions, frequencies, presences,
    TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    if bias_starts is not None:
        end = tl.load(bias_starts + row + 1)
        for first in range(tl.load(bias_starts + row), end, TOKENS):
            at, is_listed = first + tl.arange(0, TOKENS), first + tl.arange(0, TOKENS) < end
            places = logits + tl.load(bias_ids + at, mask=is_listed, other=0)
            x = tl.load(places, mask=is_listed, other=0.0)
            tl.store(places, x + tl.load(bias_values + at, mask=is_listed, other=0.0), mask=is_listed)
        tl.debug_barrier()  # before other threads read the same logits
    if penalty_starts is not None:
        repetition, frequency = tl.load(repetitions + row), tl.load(frequencies + row)
        presence = tl.load(presences + row)
        end = tl.load(penalty_starts + row + 1)
        for first in range(tl.load(penalty_starts + row), end, TOKENS):
            at, is_listed = first + tl.arange(0, TOKENS), first + tl.arange(0, TOKENS) < end
            places = logits + tl.load(penalty_ids + at, mask=is_listed, other=0)
            count = tl.load(output_counts + at, mask=is_listed, other=0)
            x = tl.load(places, mask=is_listed, other=0.0)
            x = tl.where(x > 0, x / repetition, x * repetition) - frequency * count
            tl.store(places, x - tl.where(count > 0, presence, 0.0), mask=is_listed)


@triton.jit
def _mask_kernel(logits, row_stride, num_columns, allowed, allowed_stride, num_words, WORDS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    words = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bits = tl.load(allowed + row * allowed_stride + words, mask=words < num_words, other=-1)
    offsets = tl.arange(0, _WORD)
    is_allowed = (bits[:, None] >> offsets[None, :]) & 1
    ids = words[:, None] * _WORD + offsets[None, :]
    tl.store(logits + row * row_stride + ids, float("-inf"), mask=(is_allowed == 0) & (ids < num_columns))
