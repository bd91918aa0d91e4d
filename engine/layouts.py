"""How files store a weight matrix: every layout in which GLM-4.x is published.

    layout                      codes                      scales
    floats                      weight BF16 F32 F16        none
    ModelOpt NVFP4              weight U8 [N, K/2]         weight_scale F8_E4M3 [N, K/16],
                                                           weight_scale_2 F32 [], which multiplies
    compressed-tensors NVFP4    weight_packed U8 [N, K/2]  weight_scale F8_E4M3 [N, K/16],
                                                           weight_global_scale F32 [1], which divides
    compressed-tensors MXFP4    weight_packed U8 [N, K/2]  weight_scale U8 [N, K/32], an E8M0 exponent
    Quark MXFP4                 weight U8 [N, K/2]         weight_scale U8 [N, K/32], an E8M0 exponent
    FP8 per channel             weight F8_E4M3 [N, K]      weight_scale F32 or BF16 [N, 1] or [N]

A matrix's layout is told by the dtypes of its tensors. Scales of activations may come along and are left
unread: activations are not quantized.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nybble.engine.checkpoint import Checkpoint, Span, TensorEntry
from nybble.engine.errors import CheckpointError
from nybble.kernels.quantized_tensor import (
    E2M1_MAX,
    FP8,
    MXFP4,
    NVFP4,
    NVFP4_DIVIDED,
    Format,
    QuantizedTensor,
)

FLOAT_DTYPES = ("BF16", "F32", "F16")

Entries = Mapping[str, TensorEntry]
Shape = tuple[int, ...]

# Largest |weight| that can be meant. A global scale taken the wrong way round (a factor where the file has
# a divisor) is off by its square, many orders of magnitude: weights of real models lie within 0.01 to 10.
_MAGNITUDES = (1e-5, 1e4)
_E4M3_NAN = 0x7F  # as a byte; below it lie 0 and the positive numbers, in order


@dataclass(frozen=True)
class _Companion:
    """A tensor that stands beside the codes. `shapes` gives what it may be for codes of [N, K] weights."""

    suffix: str
    dtypes: tuple[str, ...]
    shapes: Callable[[int, int], tuple[Shape, ...]]


@dataclass(frozen=True)
class Layout:
    """`format` is None for floats; `unread` are companions that may be there and are not needed."""

    name: str
    format: Format | None
    codes: str
    code_dtypes: tuple[str, ...]
    block_scale: _Companion | None = None
    global_scale: _Companion | None = None
    unread: tuple[_Companion, ...] = ()

    @property
    def companions(self) -> tuple[_Companion, ...]:
        return tuple(c for c in (self.block_scale, self.global_scale) if c is not None)

    def code_shape(self, rows: int, columns: int) -> Shape:
        return rows, columns // self.format.codes_per_item if self.format else columns


def _scalar(rows: int, columns: int) -> tuple[Shape, ...]:
    return (), (1,)


def _one_a_row(rows: int, columns: int) -> tuple[Shape, ...]:
    return (rows, 1), (rows,)


def _one_a_block(block_size: int) -> Callable[[int, int], tuple[Shape, ...]]:
    return lambda rows, columns: ((rows, columns // block_size),)


FLOATS = Layout("floats", None, "weight", FLOAT_DTYPES)
MODELOPT_NVFP4 = Layout(
    "ModelOpt NVFP4", NVFP4, "weight", ("U8",),
    block_scale=_Companion("weight_scale", ("F8_E4M3",), _one_a_block(16)),
    global_scale=_Companion("weight_scale_2", ("F32",), _scalar),
    unread=(_Companion("input_scale", ("F32",), _scalar),),
)  # fmt: skip
COMPRESSED_NVFP4 = Layout(
    "compressed-tensors NVFP4", NVFP4_DIVIDED, "weight_packed", ("U8",),
    block_scale=_Companion("weight_scale", ("F8_E4M3",), _one_a_block(16)),
    global_scale=_Companion("weight_global_scale", ("F32",), _scalar),
    unread=(_Companion("input_global_scale", ("F32",), _scalar),),
)  # fmt: skip
COMPRESSED_MXFP4 = Layout(
    "compressed-tensors MXFP4", MXFP4, "weight_packed", ("U8",),
    block_scale=_Companion("weight_scale", ("U8",), _one_a_block(32)),
)  # fmt: skip
QUARK_MXFP4 = Layout(
    "Quark MXFP4", MXFP4, "weight", ("U8",),
    block_scale=_Companion("weight_scale", ("U8",), _one_a_block(32)),
)  # fmt: skip
FP8_PER_CHANNEL = Layout(
    "FP8 per channel", FP8, "weight", ("F8_E4M3",),
    global_scale=_Companion("weight_scale", ("F32", "BF16"), _one_a_row),
    unread=(_Companion("input_scale", ("F32", "BF16"), _scalar),),
)  # fmt: skip


def find_layout(name: str, entries: Entries) -> Layout:
    """The layout in which module `name` (without ".weight") is stored.

    Raises:
        CheckpointError: it is not there, or its dtype belongs to no layout.
    """
    scale = entries.get(f"{name}.weight_scale")
    has_exponents = scale is not None and scale.dtype == "U8"
    if f"{name}.weight_packed" in entries:
        return COMPRESSED_MXFP4 if has_exponents else COMPRESSED_NVFP4
    entry = entries.get(f"{name}.weight")
    if entry is None:
        raise CheckpointError(f"the checkpoint lacks {name + '.weight'!r}")
    if entry.dtype == "U8":
        return QUARK_MXFP4 if has_exponents else MODELOPT_NVFP4
    if entry.dtype == "F8_E4M3":
        return FP8_PER_CHANNEL
    return FLOATS


def check_matrix(name: str, shape: tuple[int, int], entries: Entries) -> Iterator[str]:
    """Check the tensors that store module `name`, a matrix of `shape`; yields their names.

    Raises:
        CheckpointError: a companion is missing, or a dtype or shape is not the layout's.
    """
    layout = find_layout(name, entries)
    codes = entries[f"{name}.{layout.codes}"]
    check_columns(codes, shape[1], layout)
    check_entry(codes, (layout.code_shape(*shape),), layout.code_dtypes)
    yield codes.name
    for companion in layout.companions:
        if f"{name}.{companion.suffix}" not in entries:
            missing = f"{name}.{companion.suffix}"
            raise CheckpointError(f"{codes}: is {layout.name} but {missing!r} is missing")
    for companion in (*layout.companions, *layout.unread):
        entry = entries.get(f"{name}.{companion.suffix}")
        if entry is not None:
            check_entry(entry, companion.shapes(*shape), companion.dtypes)
            yield entry.name


def check_columns(entry: TensorEntry, columns: int, layout: Layout) -> None:
    """Raises CheckpointError unless a matrix of `columns` is made of whole blocks of `layout`."""
    block_size = layout.format.block_size if layout.format else None
    if block_size and columns % block_size:
        raise CheckpointError(f"{entry}: {columns} columns cannot be {layout.name} blocks of {block_size}")


def check_entry(entry: TensorEntry, shapes: tuple[Shape, ...], dtypes: tuple[str, ...]) -> None:
    """Raises CheckpointError unless a tensor has one of `shapes` and one of `dtypes`."""
    if entry.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise CheckpointError(f"{entry}: has shape {list(entry.shape)}, config.json calls for {expected}")
    if entry.dtype not in dtypes:
        raise CheckpointError(f"{entry}: has dtype {entry.dtype}, expected {' or '.join(dtypes)}")


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
        global_scales = _read_global_scales(checkpoint, places, layout)
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


def _read_global_scales(checkpoint: Checkpoint, places: Sequence[_Place], layout: Layout) -> Tensor:
    """float32 [E, N], one for each row, of which those of a matrix are equal unless the layout has more."""
    if layout.global_scale is None:
        raise ValueError(f"{layout.name} has no global scale")
    names = [f"{place.part.name}.{layout.global_scale.suffix}" for place in places]
    is_one_a_row = layout.block_scale is None
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


def stored_tensors(name: str, weight: QuantizedTensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors that store `weight` as module `name` in a layout of its format.

    Raises:
        ValueError: rows of one matrix have different global scales, where the layout has room for one.
    """
    tensors = {f"{name}.{layout.codes}": weight.codes}
    if layout.block_scale is not None and weight.block_scales is not None:
        stored = weight.block_scales
        is_exponent = stored.dtype == torch.float8_e8m0fnu
        tensors[f"{name}.{layout.block_scale.suffix}"] = stored.view(torch.uint8) if is_exponent else stored
    if layout.global_scale is not None and weight.global_scales is not None:
        scales = weight.global_scales
        if layout.block_scale is None:  # one for each row
            scales = scales.unsqueeze(-1)
        elif (scales == scales[0]).all():
            scales = scales[0].clone()
        else:
            raise ValueError(f"{name}: rows of one matrix have different global scales")
        tensors[f"{name}.{layout.global_scale.suffix}"] = scales
    return tensors


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
