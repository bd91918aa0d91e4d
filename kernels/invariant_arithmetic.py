"""Arithmetic that gives a token the same bits whatever else is in its step.

Products are taken of tiles with a fixed number of rows, so that a library that chooses its code by the shape
always chooses the same; the last tile is filled up with zeros. Two things are left that a library could do:
treat rows of a tile differently by their place, and give tiles of 8 and of 64 rows different bits. Both are
tried with random rows when a matrix of a new shape is first met. If places differ, a tile is one row, which
has no places; if sizes differ, all tiles are of 8.

Functions of single numbers are taken of runs that torch's vector code covers whole: its scalar code, for what
is left over at an end, has other bits. Runs are shorter than what torch divides among threads.

Attention goes through a context from its first key on, in tiles of 128 keys, and keeps for each row of a
query the largest score, the total of weights and the weighted values. Keys that a row does not see change
nothing: their weights are exactly 0, and what is kept is multiplied by exactly 1. So a row's bits do not
depend on how many rows come with it, nor on how far the context reaches beyond it.

Sums over a row (norms, softmax) need no care: torch adds up each row by itself, in an order that its length
decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_ROWS, _MANY_ROWS = 8, 64
_DEVICE_ROWS = 128  # elsewhere than on a CPU, where reading a matrix takes longer than multiplying by it
_KEY_TILE = 128
# Numbers at a time: of every vector width a multiple, and less than torch gives to more than one thread.
_VECTOR, _RUN = 128, 16384


class InvariantArithmetic:
    def __init__(self) -> None:
        self._tile_rows: dict[tuple[object, ...], tuple[int, ...]] = {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sizes = self._sizes(weight)
        parts = [_product(tile, weight)[: stop - start] for start, stop, tile in _tiles(x, sizes)]
        product = torch.cat(parts) if parts else x.new_empty(0, len(weight))
        return product if bias is None else product + bias

    def elementwise(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not x.numel():
            return function(x)
        flat = F.pad(x.flatten(), (0, -x.numel() % _VECTOR))
        return torch.cat([function(run) for run in torch.split(flat, _RUN)])[: x.numel()].view(x.shape)

    def attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tokens, num_heads, head_dim = query.shape
        context, num_kv_heads, _ = keys.shape
        key_tiles, value_tiles = _key_tiles(keys), _key_tiles(values).mT.contiguous()
        sizes = self._sizes(key_tiles[0])
        group = num_heads // num_kv_heads
        # [num_kv_heads, t * group, D], and how many keys each row sees
        rows = torch.unflatten(query.float(), 1, (num_kv_heads, group)).transpose(0, 1).flatten(1, 2)
        rows = rows * (1 / math.sqrt(head_dim))
        seen = torch.arange(context - tokens + 1, context + 1, device=query.device).repeat_interleave(group)
        parts = []
        for start, stop, tile in _tiles(rows, sizes):
            limits = F.pad(seen[start:stop], (0, tile.shape[1] - (stop - start)), value=1)
            num_tiles = -(-int(limits.max()) // _KEY_TILE)
            attended = self._attend(tile, limits, key_tiles[:num_tiles], value_tiles[:num_tiles])
            parts.append(attended[:, : stop - start])
        whole = torch.unflatten(torch.cat(parts, dim=1), 1, (tokens, group))
        return whole.transpose(0, 1).flatten(1, 2).to(query.dtype)

    def by_rows(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        rows = range(len(tensors[0]))
        return torch.cat([function(*(tensor[row : row + 1] for tensor in tensors)) for row in rows])

    def _attend(self, rows: Tensor, limits: Tensor, key_tiles: Tensor, value_tiles: Tensor) -> Tensor:
        """float32 [num_kv_heads, R, D] of rows [num_kv_heads, R, D], of which each sees its first limits [R]
        keys, over tiles [n, num_kv_heads, _KEY_TILE, D] of keys and [n, num_kv_heads, D, _KEY_TILE] of
        values."""
        largest = rows.new_full((*rows.shape[:2], 1), -torch.inf)
        total, weighted = torch.zeros_like(largest), torch.zeros_like(rows)
        places = torch.arange(_KEY_TILE, device=rows.device)
        for number, (keys, values) in enumerate(zip(key_tiles, value_tiles, strict=True)):
            is_hidden = places + number * _KEY_TILE >= limits.unsqueeze(1)
            scores = _product(rows, keys).masked_fill(is_hidden, -torch.inf)
            new_largest = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
            weights = self.elementwise(torch.exp, scores - new_largest)
            decay = self.elementwise(torch.exp, largest - new_largest)
            total = total * decay + weights.sum(dim=-1, keepdim=True)
            weighted = weighted * decay + _product(weights, values)
            largest = new_largest
        return weighted / total

    def _sizes(self, weight: Tensor) -> tuple[int, ...]:
        """Of tiles of rows for products with matrices like `weight` [..., N, K], the smallest first."""
        if weight.device.type != "cpu":
            return (_DEVICE_ROWS,)
        kind = weight.shape, weight.stride(), weight.dtype
        if kind not in self._tile_rows:
            self._tile_rows[kind] = _equal_sizes(weight)
        return self._tile_rows[kind]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """[..., R, N] of x [..., R, K] and weight [..., N, K]."""
    return x @ weight.mT


def _tiles(x: Tensor, sizes: tuple[int, ...]) -> Iterator[tuple[int, int, Tensor]]:
    """Rows start .. stop of x [..., T, K], contiguous and filled up with zeros to one of `sizes`."""
    start, num_rows = 0, x.shape[-2]
    while start < num_rows:
        left = num_rows - start
        size = sizes[-1] if 2 * left > sizes[-1] else sizes[0]
        stop = min(start + size, num_rows)
        yield start, stop, F.pad(x[..., start:stop, :], (0, 0, 0, size - (stop - start))).contiguous()
        start = stop


def _key_tiles(context: Tensor) -> Tensor:
    """float32 [n, num_kv_heads, _KEY_TILE, D] of keys or values [context, num_kv_heads, D], with zeros."""
    padded = F.pad(context.float(), (0, 0, 0, 0, 0, -len(context) % _KEY_TILE))
    return torch.unflatten(padded, 0, (-1, _KEY_TILE)).transpose(1, 2).contiguous()


def _equal_sizes(weight: Tensor) -> tuple[int, ...]:
    """Sizes of tiles that give every row the same bits, in every place and beside any others."""
    generator = torch.Generator().manual_seed(len(weight))
    lead, columns = weight.shape[:-2], weight.shape[-1]
    x = torch.randn(*lead, _MANY_ROWS, columns, generator=generator).to(weight.dtype)
    # Of small matrices others will follow, and zeros, as in a tile of keys, would hide an order of addition.
    is_small = weight.numel() <= 1 << 20
    matrix = torch.randn(weight.shape, generator=generator).to(weight.dtype) if is_small else weight
    expected = _in_tiles(x, matrix, _FEW_ROWS)
    if not all(
        torch.equal(_in_tiles(x.roll(shift, -2), matrix, _FEW_ROWS).roll(-shift, -2), expected)
        for shift in (1, 3)
    ) or not torch.equal(_in_tiles(x[..., :1, :], matrix, _FEW_ROWS), expected[..., :1, :]):
        return (1,)
    many = _in_tiles(x, matrix, _MANY_ROWS)
    rolled = _in_tiles(x.roll(5, -2), matrix, _MANY_ROWS).roll(-5, -2)
    is_same = torch.equal(many, expected) and torch.equal(rolled, expected)
    return (_FEW_ROWS, _MANY_ROWS) if is_same else (_FEW_ROWS,)


def _in_tiles(x: Tensor, weight: Tensor, size: int) -> Tensor:
    return torch.cat([_product(tile, weight)[..., : b - a, :] for a, b, tile in _tiles(x, (size,))], dim=-2)
