"""Cases of the tiny kernels, as kernels/compiled/resource_cases.py has them for the real ones."""

from __future__ import annotations

import sys

from aot_kernels import BLOCK_COLUMNS, BLOCK_ROWS, BLOCK_TOKENS, dense_matmul, summed

from nybble.kernels.compiled.resource_check import check
from nybble.kernels.compiled.resource_report import Case, LoopLimits

MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def tiny_cases(arch: int) -> list[Case]:
    matmul = LoopLimits(
        items=BLOCK_ROWS * BLOCK_COLUMNS,
        max_instructions=2.0,
        matrix=MATRIX[arch],
        loaded_bytes=2 * (BLOCK_ROWS + BLOCK_TOKENS) * BLOCK_COLUMNS,
    )
    return [Case("matmul 16 tokens", dense_matmul, {"_matmul_kernel": matmul}), Case("sum", summed)]


if __name__ == "__main__":
    sys.exit(check(tiny_cases))
