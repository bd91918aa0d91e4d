from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton_device import interpreted_only
from triton_interpreter import register_assembly

pytestmark = interpreted_only


@triton.jit
def _assembly_kernel(x, y, out, ASM: tl.constexpr, PACK: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, 4)[:, None] * N + tl.arange(0, N)[None, :]
    result = tl.inline_asm_elementwise(
        ASM, "=r,r,r", [tl.load(x + at), tl.load(y + at)], out.dtype.element_ty, is_pure=True, pack=PACK
    )
    tl.store(out + at, result)


@triton.jit
def _two_results_kernel(x, low, high, ASM: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    types: tl.constexpr = (low.dtype.element_ty, high.dtype.element_ty)
    first, second = tl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,=r,=r,r", [tl.load(x + i)], types, is_pure=True, pack=4
    )
    tl.store(low + i, first)
    tl.store(high + i, second + i)


def run(asm: str, x: Tensor, y: Tensor, pack: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype or x.dtype)
    _assembly_kernel[(1,)](x, y, out, asm, pack, x.shape[1])
    return out


def test_elements_one_by_one() -> None:
    register_assembly("sad.s32", lambda x, y: (np.abs(x - y),))
    x, y = torch.randint(-100, 100, (2, 4, 8), dtype=torch.int32)
    assert torch.equal(run("sad.s32", x, y), (x - y).abs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_floats_are_patterns(dtype: torch.dtype) -> None:
    def copy_sign(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray]:
        assert x.dtype == y.dtype == np.uint16
        return (x & np.uint16(0x7FFF) | y & np.uint16(0x8000),)

    register_assembly(tl.constexpr("copysign"), copy_sign)
    x, y = torch.randn(2, 4, 8).to(dtype)
    assert torch.equal(run("copysign", x, y), x.copysign(y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int16])
def test_two_16_bit_elements_share_a_word(dtype: torch.dtype) -> None:
    def permute(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray]:
        assert x.dtype == y.dtype == np.uint32
        assert x.shape == y.shape == (4, 4)
        return (x >> 16 | y << 16,)

    register_assembly("prmt.b32 $0, $1, $2, 0x5432;", permute)
    x, y = torch.randint(-100, 100, (2, 4, 8)).to(dtype)
    out = run("prmt.b32 $0, $1, $2, 0x5432;", x, y, pack=2)
    assert torch.equal(out[:, 0::2], x[:, 1::2])  # the first element lies in the low bits
    assert torch.equal(out[:, 1::2], y[:, 0::2])


def test_larger_elements_have_a_register_each() -> None:
    def add(*inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        assert [x.dtype for x in inputs] == [np.float32] * 4
        return inputs[0] + inputs[2], inputs[1] - inputs[3]

    register_assembly("add and subtract", add)
    x, y = torch.randn(2, 4, 8)
    out = run("add and subtract", x, y, pack=2)
    assert torch.equal(out[:, 0::2], (x + y)[:, 0::2])
    assert torch.equal(out[:, 1::2], (x - y)[:, 1::2])


def test_registers_of_several_results() -> None:
    """Four bytes in one word become four float32 in four registers and four int16 in two."""

    def widen(words: np.ndarray) -> tuple[np.ndarray, ...]:
        codes = [words >> 8 * i & np.uint32(255) for i in range(4)]
        pairs = codes[0] | codes[1] << 16, codes[2] | codes[3] << 16
        return (*(code.astype(np.float32) / 2 for code in codes), *pairs)

    register_assembly("widen", widen)
    x = torch.randint(0, 256, (32,), dtype=torch.uint8)
    low, high = torch.empty(32), torch.empty(32, dtype=torch.int16)
    _two_results_kernel[(1,)](x, low, high, "widen", 32)
    assert torch.equal(low, x.float() / 2)
    assert torch.equal(high, x.to(torch.int16) + torch.arange(32, dtype=torch.int16))


def test_assembly_without_an_emulation_is_named() -> None:
    with pytest.raises(InterpreterError, match=r"no emulation is registered for .*'mul\.hi \$0'"):
        run("mul.hi $0", torch.ones(4, 8), torch.ones(4, 8))


@pytest.mark.parametrize(
    ("asm", "outputs", "pack", "message"),
    [
        (
            "too wide",
            lambda x, y: (x.astype(np.float64),),
            1,
            r"gave \['float64'\] for registers of \[\[4\]\]",
        ),
        ("too many", lambda x, y: (x, y), 1, r"gave \['float32', 'float32'\] for registers of \[\[4\]\]"),
        ("too few", lambda *x: x[:1], 2, r"gave \['float32'\] for registers of \[\[4, 4\]\]"),
        ("uneven", lambda *x: x, 3, "packs 3 elements, the last axis has 8"),
    ],
)
def test_what_does_not_fit_the_registers(asm: str, outputs: object, pack: int, message: str) -> None:
    register_assembly(asm, outputs)
    with pytest.raises(InterpreterError, match=message):
        run(asm, torch.ones(4, 8), torch.ones(4, 8), pack=pack)
