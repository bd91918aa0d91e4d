"""Reads weight matrices as they are stored, in whatever layout: single ones, joined ones, stacks.

Parts of what becomes one matrix or stack are read to where they belong in it, without another copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nybble.engine.checkpoint.checkpoint import Checkpoint, Span, TensorEntry
from nybble.engine.checkpoint.layouts import Layout, find_layout
from nybble.engine.errors import CheckpointError
from nybble.kernels.quantized_tensor import E2M1_MAX, QuantizedTensor

# Largest |weight| that can be meant. A global scale taken the wrong way round (a factor where the file has
# a divisor) is off by its square, many orders of magnitude: weights of real models lie within 0.01 to 10.
_MAGNITUDES = (1e-5, 1e4)
_E4M3_NAN = 0x7F  # as a byte; below it lie 0 and the positive numbers, in order


@dataclass(frozen=True)
class Part:
    """Module `name` (without ".weight"), or a span of its weights."""

    name: str
    span: Span | None = None


@dataclass(frozen=True)
class _Place:
    """Where a part goes: rows start .. stop of matrix `index` of a stack."""

    part: Part
    index: int
    start: int
    stop: int


def is_uniform(checkpoint: Checkpoint, grid: Sequence[Sequence[Part]]) -> bool:
    """Whether all parts are stored in one layout, so that they can be read as one stack."""
    kinds = set()
    for part in itertools.chain.from_iterable(grid):
        layout = find_layout(part.name, checkpoint.entries)
        kinds.add((layout.name, checkpoint.entries[f"{part.name}.{layout.codes}"].dtype))
    return len(kinds) == 1


def read_matrix(checkpoint: Checkpoint, name: str, span: Span | None = None) -> Tensor | QuantizedTensor:
    """Module `name`, or a span of its weights, as it is stored: floats, or codes and scales.

    Raises:
        CheckpointError: a scale is NaN or negative, or cannot be meant.
    """
    return read_stack(checkpoint, [[Part(name, span)]])[0]


def read_stack(checkpoint: Checkpoint, grid: Sequence[Sequence[Part]]) -> Tensor | QuantizedTensor:
    """[E, N, K]: E matrices, each made of the rows of the parts in one line of a uniform `grid`.

    Raises:
        CheckpointError: a scale is NaN or negative, or cannot be meant.
    """
    layout = find_layout(grid[0][0].name, checkpoint.entries)
    places = list(_places(checkpoint, grid, layout))
    codes = _read(checkpoint, places, layout.codes, layout.format.codes_per_item if layout.format else 1)
    if layout.format is None:
        return codes
    block_scales = None
    if layout.block_scale is not None:
        stored = _read(checkpoint, places, layout.block_scale.suffix, layout.format.block_size or 1)
        block_scales = stored.view(layout.format.scale_dtype or stored.dtype)
    global_scales = None
    if layout.global_scale is not None:
        is_one_a_row = layout.block_scale is None
        global_scales = _read_global_scales(checkpoint, places, layout.global_scale.suffix, is_one_a_row)
    tensor = QuantizedTensor(codes, block_scales, global_scales, layout.format)
    for place in places:
        _check_scales(tensor, place, checkpoint.entries[f"{place.part.name}.{layout.codes}"])
    return tensor


def _places(checkpoint: Checkpoint, grid: Sequence[Sequence[Part]], layout: Layout) -> Iterator[_Place]:
    for index, parts in enumerate(grid):
        stop = 0
        for part in parts:
            start, span = stop, part.span
            num_rows = checkpoint.entries[f"{part.name}.{layout.codes}"].shape[0]
            stop += span.stop - span.start if span and span.axis == 0 else num_rows
            yield _Place(part, index, start, stop)


def _read(checkpoint: Checkpoint, places: Sequence[_Place], suffix: str, num_weights: int) -> Tensor:
    """[E, N, K / num_weights]: tensors `suffix`, of which an item stands for so many weights."""
    names = [f"{place.part.name}.{suffix}" for place in places]
    spans = [_narrowed(place.part.span, num_weights) for place in places]
    one, last = checkpoint.empty(names[0], spans[0]), places[-1]
    stack = torch.empty((last.index + 1, last.stop, one.shape[1]), dtype=one.dtype)
    rooms = (stack[place.index, place.start : place.stop] for place in places)
    checkpoint.read_into(zip(names, spans, rooms, strict=True))
    return stack


def _read_global_scales(
    checkpoint: Checkpoint, places: Sequence[_Place], suffix: str, is_one_a_row: bool
) -> Tensor:
    """float32 [E, N], one for each row, of which those of a matrix are equal unless it has one a row."""
    names = [f"{place.part.name}.{suffix}" for place in places]
    spans = [p.part.span if is_one_a_row and p.part.span and p.part.span.axis == 0 else None for p in places]
    stored = [checkpoint.empty(name, span) for name, span in zip(names, spans, strict=True)]
    checkpoint.read_into(zip(names, spans, stored, strict=True))
    scales = torch.empty(places[-1].index + 1, places[-1].stop)
    for place, scale in zip(places, stored, strict=True):
        scales[place.index, place.start : place.stop] = scale.flatten()
    return scales


def _narrowed(span: Span | None, num_weights: int) -> Span | None:
    """A span of weights, in a tensor of which an item stands for `num_weights` columns."""
    if span is None or span.axis == 0:
        return span
    return replace(span, start=span.start // num_weights, stop=span.stop // num_weights)


def _check_scales(stack: QuantizedTensor, place: _Place, entry: TensorEntry) -> None:
    rows = slice(place.start, place.stop)
    parts = [
        scales[place.index, rows]
        for scales in (stack.block_scales, stack.global_scales)
        if scales is not None
    ]
    if not all(_is_sound(scales) for scales in parts):
        raise CheckpointError(f"{entry}: its scales hold NaN or negative numbers")
    if len(parts) < 2:
        return
    global_scale = float(parts[1][0])  # that of the matrix
    factor = 1 / global_scale if stack.format.divides_by_global_scale else global_scale
    largest = _largest(parts[0]) * factor * E2M1_MAX
    low, high = _MAGNITUDES
    if place.part.span is not None:
        low = 0.0  # a part of a matrix may be nearly dead
    if largest and not low <= largest <= high:
        raise CheckpointError(
            f"{entry}: its scales make weights as large as {largest:.3g}, expected {low:g} to {high:g}: is "
            "its global scale a factor where a divisor is meant, or the other way round?"
        )


def _is_sound(scales: Tensor) -> bool:
    """Whether no scale is NaN or negative. Of bytes, the largest tells: a few times faster than as floats."""
    if scales.dtype == torch.float8_e4m3fn and scales.view(torch.uint8).amax() < _E4M3_NAN:
        return True
    return bool((scales.float() >= 0).all())


def _largest(scales: Tensor) -> float:
    """Of sound E4M3 scales, whose order is that of their bytes."""
    return float(scales.view(torch.uint8).amax().view(torch.float8_e4m3fn).float())
