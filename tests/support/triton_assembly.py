"""Inline assembly in Triton's interpreter: each text is emulated by a function of numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle
from triton_numbers import Array, silent

Emulation = Callable[..., tuple[Array, ...]]

_emulations: dict[str, Emulation] = {}


def register_assembly(text: str | tl.constexpr, emulation: Emulation) -> None:
    """Let `emulation` stand for the inline assembly `text`, the very string that the kernel uses.

    It is called with one array for every input register, in the order of the assembly's operands, and
    returns a tuple of one array for every output register. All have one shape.

    With `pack=1` an operand has one register, of the element's numpy type; 16-bit floats come and go as
    uint16 patterns, 8-bit ones as uint8. With `pack=p` each call of the assembly takes p elements: those of
    32 bits and more come as p arrays, smaller ones share uint32 words, the first element in the lowest bits
    (where p of them are less than 32 bits, one smaller word). The last axis of an array counts the calls.
    That is how 3.9 compiles it.

    The p elements are taken from adjacent places of the block's last axis. A GPU packs what one thread holds
    in successive registers, which is the same where a thread holds p contiguous elements of that axis; an
    assembly that treats all elements alike does not see the difference.
    """
    _emulations[text.value if isinstance(text, tl.constexpr) else text] = emulation


class AssemblyResult:
    """What the interpreter's `create_inline_asm` answers with."""

    def __init__(self, handles: list[TensorHandle]) -> None:
        self.get_result = handles.__getitem__


def emulate(asm: str, values: list[TensorHandle], dtypes: list[Any], pack: int) -> AssemblyResult:
    """Run the emulation of `asm`, for results of `dtypes`."""
    if asm not in _emulations:
        raise NotImplementedError(f"no emulation is registered for the inline assembly {asm!r}")
    with silent():
        outputs = _emulations[asm](*(word for value in values for word in _registers(value.data, pack)))
    return AssemblyResult(list(_results(outputs, dtypes, pack)))


def _registers(data: Array, pack: int) -> list[Array]:
    """The registers of an operand, each [.., n / pack], of its elements [.., n]."""
    if data.shape[-1] % pack:
        raise ValueError(f"the assembly packs {pack} elements, the last axis has {data.shape[-1]}")
    if data.dtype == np.float16:
        data = data.view(np.uint16)
    groups = np.ascontiguousarray(data).reshape(*data.shape[:-1], -1, pack)
    width, *_ = _register_widths(data.dtype, pack)
    if width > data.itemsize:
        groups = groups.view(f"u{width}")
    return [groups[..., i] for i in range(groups.shape[-1])]


def _results(outputs: tuple[Array, ...], dtypes: list[Any], pack: int) -> Iterator[TensorHandle]:
    """The reverse: results, each [.., n], of the output registers [.., n / pack]."""
    storages = [interpreter._get_np_dtype(dtype) for dtype in dtypes]
    widths = [_register_widths(storage, pack) for storage in storages]
    if [output.itemsize for output in outputs] != list(chain(*widths)):
        raise TypeError(
            f"the emulation gave {[str(x.dtype) for x in outputs]} for registers of {widths} bytes"
        )
    registers = iter(outputs)
    for dtype, storage, own in zip(dtypes, storages, widths, strict=True):
        groups = np.stack([next(registers) for _ in own], axis=-1).view(storage)
        yield TensorHandle(groups.reshape(*groups.shape[:-2], -1), dtype)


def _register_widths(storage: np.dtype[Any], pack: int) -> list[int]:
    """The bytes of each register that `pack` elements take."""
    width = max(storage.itemsize, min(4, storage.itemsize * pack))
    return [width] * (storage.itemsize * pack // width)
