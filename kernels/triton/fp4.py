"""FP4 weights inside kernels: from the words of `fp4_matrix` to 16-bit operands of matrix instructions.

A tile [R, 128] of weights is unpacked to columns in the order of `activation_order`, so that neither codes
nor products change threads: in SASS it goes from shared memory (LDS.64) through shifts, masks and one
multiplication per two weights straight into the matrix instruction.

Weights are the left operand and tokens the right one, of which matrix instructions take as few as 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One word of eight codes, in the bit order of `fp4_matrix`, and two equal bfloat16 scales: four pairs of
# products. The addend -0.0 makes a multiplication of the fused one that all architectures have.
UNPACK_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 code<4>, part<3>, none;
    and.b32 code0, $4, 0x81C081C0;
    shl.b32 part0, $4, 3;
    and.b32 code1, part0, 0x81C081C0;
    shl.b32 part1, $4, 6;
    and.b32 code2, part1, 0x81C081C0;
    shl.b32 part0, $4, 1;
    shr.u32 part1, $4, 3;
    shr.u32 part2, $4, 7;
    and.b32 part0, part0, 0x80008000;
    lop3.b32 part1, part1, 0x01800180, part0, 0xEA;
    lop3.b32 code3, part2, 0x00400040, part1, 0xEA;
    mov.b32 none, 0x80008000;
    fma.rn.bf16x2 $0, code0, $5, none;
    fma.rn.bf16x2 $1, code1, $5, none;
    fma.rn.bf16x2 $2, code2, $5, none;
    fma.rn.bf16x2 $3, code3, $5, none;
}""")

# One word of eight codes in natural order and two equal float16 scales.
UNPACK_TO_FLOAT16 = tl.constexpr("""{
    .reg .b8 pair<4>;
    .reg .b32 code<4>;
    mov.b32 {pair0, pair1, pair2, pair3}, $4;
    cvt.rn.f16x2.e2m1x2 code0, pair0;
    cvt.rn.f16x2.e2m1x2 code1, pair1;
    cvt.rn.f16x2.e2m1x2 code2, pair2;
    cvt.rn.f16x2.e2m1x2 code3, pair3;
    mul.rn.f16x2 $0, code0, $5;
    mul.rn.f16x2 $1, code1, $5;
    mul.rn.f16x2 $2, code2, $5;
    mul.rn.f16x2 $3, code3, $5;
}""")


@triton.jit
def unpack_weights(codes, scale_words, R: tl.constexpr, BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr):
    """16-bit floats [R, 128] of codes uint16 [R, 32] and scale_words int32 [R / 16, 512 / BLOCK_SIZE]."""
    scales = _expand_scales(scale_words, R, BLOCK_SIZE, FLOAT16)  # [R, 32]
    if FLOAT16:
        pairs = tl.inline_asm_elementwise(
            UNPACK_TO_FLOAT16,
            "=r,=r,=r,=r,r,r",
            [codes, scales],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        pairs = tl.inline_asm_elementwise(
            UNPACK_TO_BFLOAT16,
            "=r,=r,=r,=r,r,r",
            [codes, scales],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    weights = tl.join(tl.join(pairs[0], pairs[2]), tl.join(pairs[1], pairs[3]))
    # [R, block of 64, t, word, j, q] -> [R, block of 64, word, q, t, j]
    return weights.reshape(R, 2, 4, 2, 2, 4).permute(0, 1, 3, 5, 2, 4).reshape(R, 128)


@triton.jit
def _expand_scales(words, R: tl.constexpr, BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr):
    """The scale of each four codes, 16-bit floats [R, 32], of words int32 [R / 16, 512 / BLOCK_SIZE]."""
    SHIFT: tl.constexpr = (7 if FLOAT16 else 4) if BLOCK_SIZE == 16 else (10 if FLOAT16 else 7)
    MASK: tl.constexpr = (0xFF << SHIFT) & 0x7FFF
    even = (words << SHIFT) & (MASK | MASK << 16)  # bytes 0 and 2, of the first and second 64 columns
    odd = (words >> (8 - SHIFT) if SHIFT < 8 else words << (SHIFT - 8)) & (MASK | MASK << 16)
    if SHIFT == 4:
        even |= 0x70007000
        odd |= 0x70007000
    halves = tl.join(tl.join(_lower(even), _lower(odd)), tl.join(_upper(even), _upper(odd)))
    THREADS: tl.constexpr = 64 // BLOCK_SIZE
    # Joining put byte h + 2b at [..., h, b]. [n, g, t, h, b] -> [n, h, g, b, t]
    scales = halves.reshape(R // 16, 8, THREADS, 2, 2).permute(0, 3, 1, 4, 2)
    scales = scales.reshape(R, 2, THREADS, 1).broadcast_to(R, 2, THREADS, 16 // THREADS).reshape(R, 32)
    return scales.to(tl.float16 if FLOAT16 else tl.bfloat16, bitcast=True)


@triton.jit
def _lower(words):
    return (words & 0xFFFF).to(tl.uint16)


@triton.jit
def _upper(words):
    return (words >> 16 & 0xFFFF).to(tl.uint16)


@triton.jit
def tile_product(
    x_ptr, x_offsets, is_token, code_ptr, code_offsets, scale_ptr, scale_offsets, width,
    R: tl.constexpr, TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr, EVEN:
    tl.constexpr,
):  # fmt: skip
    """float32 [R, TOKENS]: R rows of weights times TOKENS rows of activations, over all `width` columns.

    x_offsets [1, TOKENS], code_offsets [R, 1] (in uint16), scale_offsets [R / 16, 1]: where rows begin.
    is_token [1, TOKENS]: the other activations are zero. EVEN: width is a multiple of 128.
    """
    WORDS: tl.constexpr = 512 // BLOCK_SIZE
    column = tl.arange(0, 128)[:, None]
    code = tl.arange(0, 32)[None, :]
    word = tl.arange(0, WORDS)[None, :]
    total = tl.zeros((R, TOKENS), tl.float32)
    for start in range(0, width, 128):
        if EVEN:
            codes = tl.load(code_ptr + (code_offsets + code))
            x = tl.load(x_ptr + (x_offsets + column), mask=is_token, other=0.0)
        else:
            codes = tl.load(code_ptr + (code_offsets + code), mask=start + (code // 16) * 64 < width, other=0)
            x = tl.load(
                x_ptr + (x_offsets + column), mask=is_token & (start + (column // 64) * 64 < width), other=0.0
            )
        scale_words = tl.load(scale_ptr + (scale_offsets + word))
        weights = unpack_weights(codes, scale_words, R, BLOCK_SIZE, FLOAT16)
        weights, x = _operands(weights, x, FLOAT16)
        total = tl.dot(weights, x, total, input_precision="ieee")
        x_ptr += 128
        code_ptr += 32
        scale_ptr += WORDS
    return total


@triton.jit
def split_product(
    x_ptr, x_offsets, is_token, code_ptr, code_offsets, scale_ptr, scale_offsets, first, step, width,
    SPLITS: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """float32 [SPLITS, R, TOKENS]: as `tile_product`, but the warps share the columns, or work on other rows.

    All offsets have a leading axis of SPLITS, as has `first`, [SPLITS, 1, 1]: split s takes the 128 columns
    from first[s] on and, while they are below width, every step-th column after; its offsets point at
    first[s]. Where splits begin at the same column they compute different rows. EVEN: each split ends with
    whole 128 columns. is_token [SPLITS, 1, TOKENS]. A batch of small products is what Triton gives one warp
    each: by cutting the long K among warps, a program of few rows keeps many loads in flight.
    """
    WORDS: tl.constexpr = 512 // BLOCK_SIZE
    column = tl.arange(0, 128)[None, :, None]
    code = tl.arange(0, 32)[None, None, :]
    word = tl.arange(0, WORDS)[None, None, :]
    total = tl.zeros((SPLITS, R, TOKENS), tl.float32)
    for start in range(0, width, step):
        if EVEN:
            codes = tl.load(code_ptr + (code_offsets + code))
            x = tl.load(x_ptr + (x_offsets + column), mask=is_token, other=0.0)
            scale_words = tl.load(scale_ptr + (scale_offsets + word))
        else:
            left = width - start - first
            codes = tl.load(code_ptr + (code_offsets + code), mask=(code // 16) * 64 < left, other=0)
            x = tl.load(x_ptr + (x_offsets + column), mask=is_token & ((column // 64) * 64 < left), other=0.0)
            scale_words = tl.load(scale_ptr + (scale_offsets + word), mask=left > 0, other=0)
        weights = unpack_weights(
            codes.reshape(SPLITS * R, 32), scale_words.reshape(SPLITS * R // 16, WORDS),
            SPLITS * R, BLOCK_SIZE, FLOAT16,
        ).reshape(SPLITS, R, 128)  # fmt: skip
        weights, x = _operands(weights, x, FLOAT16)
        total = tl.dot(weights, x, total, input_precision="ieee")
        x_ptr += step
        code_ptr += step // 4
        scale_ptr += step // 128 * WORDS
    return total


@triton.jit
def product(
    x_ptr, x_offsets, is_token, code_ptr, code_offsets, scale_ptr, scale_offsets, width,
    SPLITS: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`tile_product`, or with SPLITS > 1 the same with the columns shared among SPLITS warps."""
    if SPLITS == 1:
        return tile_product(
            x_ptr, x_offsets, is_token, code_ptr, code_offsets, scale_ptr, scale_offsets, width,
            R, TOKENS, BLOCK_SIZE, FLOAT16, EVEN,
        )  # fmt: skip
    else:
        split = tl.arange(0, SPLITS)[:, None, None]
        sums = split_product(
            x_ptr, split * 128 + x_offsets[None, :, :], is_token[None, :, :],
            code_ptr, split * 32 + code_offsets[None, :, :],
            scale_ptr, split * (512 // BLOCK_SIZE) + scale_offsets[None, :, :],
            split * 128, SPLITS * 128, width, SPLITS, R, TOKENS, BLOCK_SIZE, FLOAT16, EVEN,
        )  # fmt: skip
        return tl.sum(sums, 0)


@triton.jit
def _operands(weights, x, FLOAT16: tl.constexpr):
    """Both in one type: float32 if the activations are, else that of the weights.

    Converting to float16 here costs as much as unpacking: who makes the activations should store float16.
    """
    if x.dtype == tl.float32:
        weights = weights.to(tl.float32)
    elif x.dtype != weights.dtype:
        x = x.to(tl.float32)
        if FLOAT16:
            x = tl.clamp(x, -65504.0, 65504.0)
        x = x.to(weights.dtype)
    return weights, x


@triton.jit
def narrow(values, y_ptr):
    """float32 to the type of y; float16 keeps its largest number instead of infinity."""
    if y_ptr.dtype.element_ty == tl.float16:
        values = tl.clamp(values, -65504.0, 65504.0)
    return values.to(y_ptr.dtype.element_ty)
