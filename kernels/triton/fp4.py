"""FP4 weights inside kernels: from the words of `fp4_matrix` to 16-bit operands of matrix instructions.

Each 32-bit word of codes becomes four pairs of weights, by shifts, masks and one multiplication for each pair
(or a conversion and a multiplication). Neither codes nor products change threads: in SASS they go from shared
memory (LDS.64) straight into the matrix instruction. So pair q of all words is an operand of its own, 16
columns wide, of columns 8q .. 8q + 7 and 32 + 8q .. 32 + 8q + 7 of every 64 in the order of
`activation_order`. Instructions that all warps wait for together (wgmma, tcgen05) rather take the four as one
operand of 64 columns. Elsewhere such joining is harmful: Triton 3.6 and 3.7 then choose an operand layout in
which the elements that one inline assembly takes are no neighbours, and the weights come out wrong.

Weights are the left operand and tokens the right one, of which matrix instructions take as few as 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One word of eight codes, in the bit order of `fp4_matrix`, and two equal bfloat16 scales to four pairs of
# products. Scales come for each four codes, so there is a second, equal operand $6. The addend -0.0 makes a
# multiplication of the fused one that all architectures have.
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

# One word of eight codes in natural order and two equal float16 scales, likewise.
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


def num_splits(width: int, most: int) -> int:
    """How many warps should share `width` columns: so many, a power of two, that all have the same work."""
    while most > 2 and width % (256 * most):
        most //= 2
    return most


def is_roomy(arch: int) -> bool:
    """Whether a multiprocessor has shared memory (227 KiB) for two programs of 64 rows by 1024 columns, which
    cost fewer instructions for a weight than those of 32 rows."""
    return arch in (90, 100)


@triton.jit
def unpack_weights(codes, scale_bytes, R: tl.constexpr, BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr):
    """Four operands [R, 16], 16-bit floats, of 64 columns: codes uint16 [R, 16], scale_bytes int32
    [R, 64 / BLOCK_SIZE]. Operand q has the columns `quarter(q)`."""
    scales = _expand_scales(scale_bytes, R, BLOCK_SIZE, FLOAT16)
    if FLOAT16:
        pairs = tl.inline_asm_elementwise(
            UNPACK_TO_FLOAT16,
            "=r,=r,=r,=r,r,r,r",
            [codes, scales],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        pairs = tl.inline_asm_elementwise(
            UNPACK_TO_BFLOAT16,
            "=r,=r,=r,=r,r,r,r",
            [codes, scales],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return _in_order(pairs[0], R), _in_order(pairs[1], R), _in_order(pairs[2], R), _in_order(pairs[3], R)


@triton.jit
def quarter(q: tl.constexpr):
    """int32 [16]: the columns of operand q among 64."""
    k = tl.arange(0, 16)
    return (k // 8) * 32 + q * 8 + k % 8


@triton.jit
def scale_offset(row, stride, BLOCK_SIZE: tl.constexpr):
    """Where the scale words of a row begin: int tensor of any shape, to the same; stride: of 16 rows."""
    return (row // 16) * stride + (row % 16) * (64 // BLOCK_SIZE)


@triton.jit
def _expand_scales(scale_bytes, R: tl.constexpr, BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr):
    """The 16-bit scale of each four codes, twice in a word: int32 [R, 16] of bytes [R, 64 / BLOCK_SIZE]."""
    SHIFT: tl.constexpr = (7 if FLOAT16 else 4) if BLOCK_SIZE == 16 else (10 if FLOAT16 else 7)
    BLOCKS: tl.constexpr = 64 // BLOCK_SIZE
    scales = scale_bytes * (0x10001 << SHIFT)
    if SHIFT == 4:
        scales |= 0x70007000
    return scales.reshape(R, BLOCKS, 1).broadcast_to(R, BLOCKS, 16 // BLOCKS).reshape(R, 16)


@triton.jit
def _in_order(pairs, R: tl.constexpr):
    # [R, t, word, j] -> [R, word, t, j]
    return pairs.reshape(R, 4, 2, 2).permute(0, 2, 1, 3).reshape(R, 16)


@triton.jit
def joined(operands, R: tl.constexpr):
    """[R, 64] of the four of `unpack_weights`."""
    weights = tl.join(tl.join(operands[0], operands[2]), tl.join(operands[1], operands[3]))
    # [R, word, t, j, q] -> [R, word, q, t, j]
    return weights.reshape(R, 2, 4, 2, 4).permute(0, 1, 4, 2, 3).reshape(R, 64)


@triton.jit
def tile_product(
    x_ptr, x_offsets, is_token, code_ptr, code_offsets, scale_ptr, scale_offsets, width,
    R: tl.constexpr, TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr,
    JOINED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """float32 [R, TOKENS]: R rows of weights times TOKENS rows of activations, over all `width` columns.

    x_offsets [1, TOKENS], code_offsets [R, 1] (in uint16), scale_offsets [R, 1]: where rows begin.
    is_token [1, TOKENS]: the other activations are zero. EVEN: width is a multiple of 256.
    """
    BLOCKS: tl.constexpr = 64 // BLOCK_SIZE
    column = tl.arange(0, 64)[:, None]
    code = tl.arange(0, 16)[None, :]
    word = tl.arange(0, BLOCKS)[None, :]
    total = tl.zeros((R, TOKENS), tl.float32)
    for start in range(0, width, 256):
        left = width - start + tl.zeros((1, 1), tl.int32)
        scale_words = tl.load(scale_ptr + (scale_offsets + word))
        for b in tl.static_range(4):
            codes, is_read = _load_codes(code_ptr, code_offsets + code, is_token, left, b, EVEN)
            weights = unpack_weights(codes, scale_words >> (8 * b) & 0xFF, R, BLOCK_SIZE, FLOAT16)
            if JOINED:
                x = tl.load(x_ptr + 64 * b + (x_offsets + column), mask=is_read, other=0.0)
                w, x = _operands(joined(weights, R), x, FLOAT16)
                total = tl.dot(w, x, total, input_precision="ieee")
            else:
                for q in tl.static_range(4):
                    at = x_ptr + 64 * b + (x_offsets + quarter(q)[:, None])
                    x = tl.load(at, mask=is_read, other=0.0)
                    w, x = _operands(weights[q], x, FLOAT16)
                    total = tl.dot(w, x, total, input_precision="ieee")
        x_ptr += 256
        code_ptr += 64
        scale_ptr += 16 * BLOCKS
    return total


@triton.jit
def split_product(
    x_ptr, x_offsets, is_token, code_ptr, code_offsets, scale_ptr, scale_offsets, first, step, width,
    SPLITS: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """float32 [SPLITS, R, TOKENS]: as `tile_product`, but the warps share the columns, or work on other rows.

    All offsets have a leading axis of SPLITS, as has `first`, [SPLITS, 1, 1]: split s takes the 256 columns
    from first[s] on and, while they are below width, every step-th column after; its offsets point at
    first[s]. Where splits begin at the same column they compute different rows. EVEN: each split ends with
    whole 256 columns. is_token [SPLITS, 1, TOKENS]. A batch of small products is what Triton gives one warp
    each: by cutting the long K among warps, a program of few rows keeps many loads in flight.
    """
    BLOCKS: tl.constexpr = 64 // BLOCK_SIZE
    code = tl.arange(0, 16)[None, None, :]
    word = tl.arange(0, BLOCKS)[None, None, :]
    total = tl.zeros((SPLITS, R, TOKENS), tl.float32)
    for start in range(0, width, step):
        left = width - start - first
        if EVEN:
            scale_words = tl.load(scale_ptr + (scale_offsets + word))
        else:
            scale_words = tl.load(scale_ptr + (scale_offsets + word), mask=left > 0, other=0)
        scale_words = scale_words.reshape(SPLITS * R, BLOCKS)
        for b in tl.static_range(4):
            codes, is_read = _load_codes(code_ptr, code_offsets + code, is_token, left, b, EVEN)
            weights = unpack_weights(
                codes.reshape(SPLITS * R, 16), scale_words >> (8 * b) & 0xFF,
                SPLITS * R, BLOCK_SIZE, FLOAT16,
            )  # fmt: skip
            for q in tl.static_range(4):
                at = x_ptr + 64 * b + (x_offsets + quarter(q)[None, :, None])
                x = tl.load(at, mask=is_read, other=0.0)
                w, x = _operands(weights[q].reshape(SPLITS, R, 16), x, FLOAT16)
                total = tl.dot(w, x, total, input_precision="ieee")
        x_ptr += step
        code_ptr += step // 4
        scale_ptr += step // 16 * BLOCKS
    return total


@triton.jit
def _load_codes(pointer, offsets, is_token, left, b: tl.constexpr, EVEN: tl.constexpr):
    """The b-th 64 columns' codes, and which activations meet them; `left` columns are in the matrix, or all
    with EVEN."""
    if EVEN:
        return tl.load(pointer + 16 * b + offsets), is_token
    else:
        is_inside = left > 64 * b
        return tl.load(pointer + 16 * b + offsets, mask=is_inside, other=0), is_token & is_inside


@triton.jit
def product(
    x_ptr, x_offsets, is_token, code_ptr, code_offsets, scale_ptr, scale_offsets, width,
    SPLITS: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr, JOINED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`tile_product`, or with SPLITS > 1 the same with the columns shared among SPLITS warps."""
    if SPLITS == 1:
        return tile_product(
            x_ptr, x_offsets, is_token, code_ptr, code_offsets, scale_ptr, scale_offsets, width,
            R, TOKENS, BLOCK_SIZE, FLOAT16, JOINED, EVEN,
        )  # fmt: skip
    else:
        split = tl.arange(0, SPLITS)[:, None, None]
        sums = split_product(
            x_ptr, split * 256 + x_offsets[None, :, :], is_token[None, :, :],
            code_ptr, split * 64 + code_offsets[None, :, :],
            scale_ptr, split * (1024 // BLOCK_SIZE) + scale_offsets[None, :, :],
            split * 256, SPLITS * 256, width, SPLITS, R, TOKENS, BLOCK_SIZE, FLOAT16, EVEN,
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
