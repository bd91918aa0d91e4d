"""`tl.dot_scaled` in the repaired interpreter: every code under every scale, operands in every format."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from closeness import assert_close
from torch import Tensor
from triton_device import interpreted_only

pytestmark = interpreted_only

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = {"e4m3": E4M3, "e5m2": E5M2, "bf16": torch.bfloat16, "fp16": torch.float16}
BYTES = torch.arange(256).to(torch.uint8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Operand:
    """Rows of K numbers: lhs as it is, rhs transposed. Scales are [rows, K / group]."""

    stored: Tensor
    format: str
    scale: Tensor | None = None
    k_pack: bool = True


def packed(codes: Tensor, axis: int) -> Tensor:
    """e2m1 codes, two to a byte along `axis`, the first in the low bits."""
    low, high = codes.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return (low | high << 4).to(torch.uint8)


@triton.jit
def _tile(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(pointer + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _dot_scaled_kernel(
    a, a_scale, b, b_scale, out,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, A_PACK: tl.constexpr, B_PACK: tl.constexpr,
    A_ROWS: tl.constexpr, A_COLUMNS: tl.constexpr, B_ROWS: tl.constexpr, B_COLUMNS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, A_GROUPS: tl.constexpr, B_GROUPS: tl.constexpr,
):  # fmt: skip
    left, right = _tile(a, A_ROWS, A_COLUMNS), _tile(b, B_ROWS, B_COLUMNS)
    left_scale = _tile(a_scale, M, A_GROUPS) if A_GROUPS else None
    right_scale = _tile(b_scale, N, B_GROUPS) if B_GROUPS else None
    product = tl.dot_scaled(
        left, left_scale, A_FORMAT, right, right_scale, B_FORMAT, lhs_k_pack=A_PACK, rhs_k_pack=B_PACK
    )
    tl.store(out + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], product)


def dot_scaled(lhs: Operand, rhs: Operand) -> Tensor:
    a, b = lhs.stored.contiguous(), rhs.stored.T.contiguous()
    m, n = (len(side.stored) * (1 if side.k_pack else 2) for side in (lhs, rhs))
    out = torch.full((m, n), torch.nan)
    _dot_scaled_kernel[(1,)](
        a, lhs.scale, b, rhs.scale, out,
        lhs.format, rhs.format, lhs.k_pack, rhs.k_pack, *a.shape, *b.shape,
        m, n, *(0 if side.scale is None else side.scale.shape[1] for side in (lhs, rhs)),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("form", ["e2m1", "e4m3", "e5m2"])
def test_every_code_under_every_power_of_two(form: str) -> None:
    """Row c has the e8m0 scale c, 2 ** (c - 127); the other operand is the identity."""
    if form == "e2m1":
        codes = BYTES[:32] % 16
        numbers, stored = E2M1[codes.int()], packed(codes, 0)
    else:
        numbers = BYTES.view(DTYPES[form]).double()
        stored = BYTES.view(DTYPES[form]).where(numbers.isfinite(), 0)
        numbers = numbers.where(numbers.isfinite(), 0)
    identity = Operand(torch.eye(len(numbers)).bfloat16(), "bf16")
    scales = BYTES[:, None].where(numbers.max() * torch.exp2(BYTES.double() - 127)[:, None] < 2.0**127, 255)
    lhs = Operand(stored.expand(256, -1), form, scales.expand(-1, len(numbers) // 32).contiguous())
    expected = (numbers * torch.exp2(scales.double() - 127)).where(scales != 255, torch.nan).float()
    for product in (dot_scaled(lhs, identity), dot_scaled(identity, lhs).T):
        torch.testing.assert_close(product, expected, rtol=0, atol=0, equal_nan=True)


def test_every_e2m1_code_under_every_e4m3_scale() -> None:
    scales = BYTES.view(E4M3)[:, None]
    lhs = Operand(packed(BYTES[:16], 0).expand(256, -1), "e2m1", scales)
    expected = (E2M1 * scales.double()).float()
    product = dot_scaled(lhs, Operand(torch.eye(16).bfloat16(), "bf16"))
    torch.testing.assert_close(product, expected, rtol=0, atol=0, equal_nan=True)


def random_operand(rows: int, k: int, form: str, scale: str | None, k_pack: bool) -> tuple[Operand, Tensor]:
    """The operand and what it stands for, [rows, K] in float64."""
    if form == "e2m1":
        codes = torch.randint(0, 16, (rows, k))
        stored, numbers = packed(codes, 1 if k_pack else 0), E2M1[codes]
    else:
        stored = torch.randn(rows, k).to(DTYPES[form])
        numbers = stored.double()
    if scale is None:
        return Operand(stored, form, None, k_pack), numbers
    if scale == "e4m3":
        scales = torch.rand(rows, k // 16).to(E4M3)
        factors = scales.double()
    else:
        scales = torch.randint(124, 131, (rows, k // 32), dtype=torch.uint8)
        factors = torch.exp2(scales.double() - 127)
    return Operand(stored, form, scales, k_pack), numbers * factors.repeat_interleave(
        k // factors.shape[1], 1
    )


@pytest.mark.parametrize(
    ("lhs", "rhs"),
    [
        (("e2m1", "e8m0", True), ("e2m1", "e8m0", True)),
        (("e2m1", "e4m3", True), ("e2m1", "e4m3", True)),
        (("e2m1", "e8m0", False), ("e4m3", "e8m0", True)),
        (("e5m2", "e8m0", True), ("e2m1", "e8m0", False)),
        (("e4m3", "e8m0", True), ("e5m2", "e8m0", True)),
        (("bf16", None, True), ("e2m1", "e8m0", True)),
        (("e2m1", "e4m3", True), ("fp16", None, True)),
        (("fp16", None, True), ("e4m3", "e8m0", True)),
        (("e4m3", None, True), ("e2m1", None, True)),
    ],
)
def test_random_products(lhs: tuple[str, str | None, bool], rhs: tuple[str, str | None, bool]) -> None:
    left, numbers_left = random_operand(16, 64, *lhs)
    right, numbers_right = random_operand(32, 64, *rhs)
    assert_close(dot_scaled(left, right), numbers_left @ numbers_right.T, max_error=2e-6, rms_error=5e-7)
