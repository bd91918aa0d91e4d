"""Which tokens of a row min_p, top_k and top_p keep, found without a sort by the one program of the row.

Kept is always a beginning of the tokens in falling order (of equal logits the lowest id first), so the
filters ask where it ends. That is found by bisecting the bits of the logits: count the tokens, or add the
weights of those, that are not below the middle, and go on in one half, until between its ends there is one
token or only equal ones. Float32 has 32 bits, so that takes at most 32 steps; usually some 15.

To read few logits in each step, the row comes with its peaks, the largest logits of segments of 64 tokens.
If k peaks reach a bound, k logits do; if peaks of some weight reach it, logits of that weight do. So
bisecting the peaks gives a bound that all kept tokens reach, and from then on only segments that reach it
are read: about k of them, or about as many as top_p keeps tokens. Where the peaks together don't weigh
enough, which means a nearly flat distribution, every step reads the whole row.

Weights are integers, in units of 2^-40 of the likeliest token's: their sums are the same in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.kernels.triton.random_bits import exponential, token_bits
from nybble.kernels.triton.sort_keys import (
    LOWEST,
    MINUS_INFINITY_KEY,
    key_numbers,
    packed,
    packed_ids,
    sort_keys,
)

SEGMENT = tl.constexpr(64)
_ENOUGH = tl.constexpr(16)
"""Where bisecting the peaks stops: with so many segments more than needed."""


@triton.jit
def first_kept_token(row_logits, row_peaks, filters, draw, winner, scale, total, TILE: tl.constexpr):
    """Of the tokens that the filters keep, the first to arrive, packed.

    row_logits: logits of the row, the number of its columns, and of token ids. row_peaks: float32 peaks of
    all segments, int32 space for a list of segments, and their number. filters: top_k, top_p, min_p. winner:
    the first of all tokens to arrive, packed. scale: the largest logit, which is finite, and the inverse of
    the temperature. total: what the row weighs, float64.
    """
    top_k, top_p, min_p = filters
    low = _lowest_key(min_p, scale)
    is_kept = tl.full((), False, tl.int1)
    if (top_p >= 1) | ((top_k <= 0) & (min_p <= 0)):
        is_kept = _is_kept(packed_ids(winner), low, row_logits, row_peaks, filters, scale, total, TILE)
    if not is_kept:
        winner = _first_of_kept(low, row_logits, row_peaks, filters, draw, scale, total, TILE)
    return winner


@triton.jit
def segment_ids(segments):
    """int32 [SEGMENTS, 64]: the tokens of segments, int32 [SEGMENTS]."""
    return segments[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]


@triton.jit
def load_logits(row_logits, ids):
    """Those of `ids`, int32 of any shape; -inf where there is no token.

    The load is masked by the width of the row, which may be a multiple of 16 and then loads 16 bytes at once.
    """
    logits, num_columns, num_token_ids = row_logits
    x = tl.load(logits + ids, mask=ids < num_columns, other=float("-inf"))
    return tl.where(ids < num_token_ids, x, float("-inf"))


@triton.jit
def first_to_arrive(x, ids, draw, scale):
    """The winner of the race (see `random_bits`) of logits x at rates e^((x - top) / temperature).

    Packed, with the key of the negative time: the largest is the first.
    """
    top, inverse = scale
    times = exponential(token_bits(draw, ids)) * tl.exp((top - x) * inverse)
    return tl.max(packed(sort_keys(-times), ids))


@triton.jit
def weights_of(x, scale):
    """int64: e^((x - top) / temperature) in units of 2^-40, rounded down; x is not above top."""
    top, inverse = scale
    bits = tl.exp2((x - top) * (inverse * 1.4426950408889634)).to(tl.int32, bitcast=True)
    mantissas = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64) << 17
    return mantissas >> tl.minimum((127 - (bits >> 23)).to(tl.uint32, bitcast=True), 63)


@triton.jit
def _lowest_key(min_p, scale):
    """The key of the least logit that min_p keeps, which is never -inf."""
    top, inverse = scale
    low = tl.full((), MINUS_INFINITY_KEY + 1, tl.int32)
    if min_p > 0:
        low = tl.maximum(low, sort_keys(top + tl.log(tl.minimum(min_p, 1.0)) / inverse))
    return low


@triton.jit
def _needed_weight(top_p, total):
    """What top_p of the total asks for, rounded up: at least one token."""
    return tl.maximum(tl.ceil(top_p.to(tl.float64) * total).to(tl.int64), 1)


@triton.jit
def _is_kept(token, low, row_logits, row_peaks, filters, scale, total, TILE: tl.constexpr):
    """Whether a token is, by what comes before it: of filters by top_p alone, or without top_p.

    Also False where more segments than top_k reach its logit: before one reads them, one can search.
    """
    top_k, top_p, _ = filters
    logits, _, _ = row_logits
    _, listed, _ = row_peaks
    x = tl.load(logits + token)
    is_kept = sort_keys(x) >= low
    if is_kept & ((top_k > 0) | (top_p < 1)):
        num_listed = _list_segments(row_peaks, sort_keys(x), TILE)
        is_kept = (top_k <= 0) | (num_listed <= top_k)
        if is_kept:
            count, weight = _before(token, x, (row_logits, listed, num_listed), scale, TILE)
            is_kept = tl.where(top_k > 0, count < top_k, weight < _needed_weight(top_p, total))
    return is_kept


@triton.jit
def _before(token, least, source, scale, TILE: tl.constexpr):
    """Number and weight of the logits above that of a token, `least`, and of equal ones with lower ids."""
    counts = tl.zeros((TILE // SEGMENT, SEGMENT), tl.int32)
    weights = tl.zeros((TILE // SEGMENT, SEGMENT), tl.int64)
    for i in range(_num_tiles(source, TILE, ARE_PEAKS=False)):
        ids, x = _listed_tile(i, source, TILE)
        is_before = (x > least) | ((x == least) & (ids < token))
        counts += is_before.to(tl.int32)
        weights += tl.where(is_before, weights_of(x, scale), 0)
    return tl.sum(counts), tl.sum(weights)


@triton.jit
def _first_of_kept(low, row_logits, row_peaks, filters, draw, scale, total, TILE: tl.constexpr):
    """Search for the border of what is kept, from key `low` on, then for the first to arrive."""
    top_k, top_p, min_p = filters
    _, listed, _ = row_peaks
    end = sort_keys(scale[0]) + 1
    if top_k > 0:
        low, _ = _bisect(low, end, top_k, _ENOUGH, row_peaks, scale, TILE, ARE_PEAKS=True, BY_WEIGHT=False)
    elif min_p <= 0:
        needed = _needed_weight(top_p, total)
        low, _ = _bisect(low, end, needed, _ENOUGH, row_peaks, scale, TILE, ARE_PEAKS=True, BY_WEIGHT=True)
    source = (row_logits, listed, _list_segments(row_peaks, low, TILE))
    # Kept are the logits from `high` on, and of those from `low` to `high`, which are equal, num_ties.
    high, num_ties = low, 0
    if top_k > 0:
        low, high = _bisect(low, end, top_k, 1, source, scale, TILE, ARE_PEAKS=False, BY_WEIGHT=False)
        count, weight, num_between, tie_weight = _border(low, high, source, scale, TILE)
        num_ties = tl.minimum(top_k - count, num_between).to(tl.int32)
        total = (weight + num_ties * tie_weight).to(tl.float64)
    if top_p < 1:
        if (top_k <= 0) & (min_p > 0):
            total = _border(low, low, source, scale, TILE)[1].to(tl.float64)
        needed = _needed_weight(top_p, total)
        low, high = _bisect(low, end, needed, 1, source, scale, TILE, ARE_PEAKS=False, BY_WEIGHT=True)
        count, weight, num_between, tie_weight = _border(low, high, source, scale, TILE)
        num_ties = tl.minimum(tl.cdiv(needed - weight, tl.maximum(tie_weight, 1)), num_between).to(tl.int32)
    return _first_token(low, high, num_ties, source, scale, draw, TILE)


@triton.jit
def _list_segments(row_peaks, key, TILE: tl.constexpr):
    """Write the numbers of the segments that reach `key` into the row's list; returns how many there are."""
    peaks, listed, num_segments = row_peaks
    num_listed = 0
    for first in range(0, num_segments, TILE):
        segments = first + tl.arange(0, TILE)
        x = tl.load(peaks + segments, mask=segments < num_segments, other=float("-inf"))
        is_listed = (x >= key_numbers(key)).to(tl.int32)
        places = num_listed + tl.cumsum(is_listed) - is_listed
        tl.store(listed + places, segments, mask=is_listed > 0)
        num_listed += tl.sum(is_listed)
    tl.debug_barrier()  # before other threads read the list
    return num_listed


# Reading. A source is row_peaks (ARE_PEAKS) or the logits of listed segments: row_logits, the list and its
# length. It is read in tiles [TILE / 64, 64].


@triton.jit
def _bisect(
    low, high, needed, slack, source, scale,
    TILE: tl.constexpr, ARE_PEAKS: tl.constexpr, BY_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Keys (low, high): from low on there are `needed` logits, or that weight, and from high on less.

    Between them are no more than `slack` logits, or equal ones. If there is not enough, as they were.
    """
    first_tile = _tile(0, source, scale, TILE, ARE_PEAKS, BY_WEIGHT)  # stays in registers
    amount, num_low = _amount(low, first_tile, source, scale, TILE, ARE_PEAKS, BY_WEIGHT)
    num_high = 0
    while (amount >= needed) & (low + 1 < high) & (num_low - num_high > slack):
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        found, count = _amount(middle, first_tile, source, scale, TILE, ARE_PEAKS, BY_WEIGHT)
        is_enough = found >= needed
        low, num_low = tl.where(is_enough, middle, low), tl.where(is_enough, count, num_low)
        high, num_high = tl.where(is_enough, high, middle), tl.where(is_enough, num_high, count)
    return low, high


@triton.jit
def _amount(
    key, first_tile, source, scale, TILE: tl.constexpr, ARE_PEAKS: tl.constexpr, BY_WEIGHT: tl.constexpr
):
    """What `needed` asks for, and the count."""
    count, weight = _from(key, first_tile, source, scale, TILE, ARE_PEAKS, BY_WEIGHT)
    return (weight, count) if BY_WEIGHT else (count, count)


@triton.jit
def _border(low, high, source, scale, TILE: tl.constexpr):
    """Number and weight of the logits from high on; number of those from low to high, weight of each."""
    first_tile = _tile(0, source, scale, TILE, ARE_PEAKS=False, WEIGH=True)
    count, weight = _from(high, first_tile, source, scale, TILE, ARE_PEAKS=False, WEIGH=True)
    count_low, weight_low = _from(low, first_tile, source, scale, TILE, ARE_PEAKS=False, WEIGH=True)
    return count, weight, count_low - count, (weight_low - weight) // tl.maximum(count_low - count, 1)


@triton.jit
def _from(key, first_tile, source, scale, TILE: tl.constexpr, ARE_PEAKS: tl.constexpr, WEIGH: tl.constexpr):
    """How many logits are not below the number of `key`, int32, and if WEIGH what they weigh, int64."""
    least = key_numbers(key)
    counts, weights = _counted(least, first_tile)
    for i in range(1, _num_tiles(source, TILE, ARE_PEAKS)):
        more_counts, more_weights = _counted(least, _tile(i, source, scale, TILE, ARE_PEAKS, WEIGH))
        counts += more_counts
        weights += more_weights
    return tl.sum(counts), tl.sum(weights)


@triton.jit
def _counted(least, tile):
    x, weights = tile
    return (x >= least).to(tl.int32), tl.where(x >= least, weights, 0)


@triton.jit
def _tile(i, source, scale, TILE: tl.constexpr, ARE_PEAKS: tl.constexpr, WEIGH: tl.constexpr):
    """Logits and, if WEIGH, their weights."""
    if ARE_PEAKS:
        x = _peaks_tile(i, source, TILE)
    else:
        _, x = _listed_tile(i, source, TILE)
    return x, weights_of(x, scale) if WEIGH else tl.zeros(x.shape, tl.int64)


@triton.jit
def _num_tiles(source, TILE: tl.constexpr, ARE_PEAKS: tl.constexpr):
    _, _, count = source
    return tl.cdiv(count, TILE if ARE_PEAKS else TILE // SEGMENT)


@triton.jit
def _peaks_tile(i, row_peaks, TILE: tl.constexpr):
    peaks, _, num_segments = row_peaks
    at = segment_ids(tl.arange(0, TILE // SEGMENT) + i * (TILE // SEGMENT))
    return tl.load(peaks + at, mask=at < num_segments, other=float("-inf"))


@triton.jit
def _listed_tile(i, source, TILE: tl.constexpr):
    """ids and logits of listed segments; -inf beyond the list."""
    row_logits, listed, num_listed = source
    _, num_columns, _ = row_logits
    places = tl.arange(0, TILE // SEGMENT) + i * (TILE // SEGMENT)
    beyond = num_columns // SEGMENT + 1
    ids = segment_ids(tl.load(listed + places, mask=places < num_listed, other=beyond))
    return ids, load_logits(row_logits, ids)


@triton.jit
def _first_token(low, high, num_ties, source, scale, draw, TILE: tl.constexpr):
    """Of the logits from high on and the first num_ties from low to high the first to arrive, packed."""
    first = tl.full((), LOWEST, tl.int64)
    num_seen = 0
    for i in range(_num_tiles(source, TILE, ARE_PEAKS=False)):
        ids, x = _listed_tile(i, source, TILE)
        is_above = x >= key_numbers(high)
        is_tie = ((x >= key_numbers(low)) & ~is_above).to(tl.int32)
        rank = tl.reshape(tl.cumsum(tl.reshape(is_tie, (TILE,))), (TILE // SEGMENT, SEGMENT)) + num_seen
        num_seen += tl.sum(is_tie)
        is_kept = is_above | ((is_tie > 0) & (rank <= num_ties))
        first = tl.maximum(first, first_to_arrive(tl.where(is_kept, x, float("-inf")), ids, draw, scale))
    return first
