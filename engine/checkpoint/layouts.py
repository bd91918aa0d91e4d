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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.engine.checkpoint.checkpoint import TensorEntry
from nybble.engine.errors import CheckpointError
from nybble.kernels.quantized_tensor import (
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
