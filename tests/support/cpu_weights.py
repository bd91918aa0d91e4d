"""Random weights of every kind that the native CPU backend takes, and what int8 activations stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.cpu.cpu_matrix import CpuMatrix, Kind, prepare
from nybble.kernels.quantized_tensor import FP8, MXFP4, NVFP4, NVFP4_DIVIDED, Format, QuantizedTensor, stack

FP4_FORMATS = (NVFP4, NVFP4_DIVIDED, MXFP4)
_E2M1_RMS = 2.9  # of all its codes


def generator_of(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(seed * 7919**i for i, seed in enumerate(seeds)) % 2**63)


def random_fp4(format: Format, rows: int, columns: int, seed: int = 0) -> QuantizedTensor:
    """All codes, scales that differ; products of a row with normal activations are about normal."""
    assert format.block_size is not None
    generator, size = generator_of(seed, rows, columns), 1 / (_E2M1_RMS * columns**0.5)
    codes = torch.randint(256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scales = size * (0.5 + torch.rand((rows, columns // format.block_size), generator=generator))
    if format is MXFP4:
        return QuantizedTensor(codes, scales.to(torch.float8_e8m0fnu), None, format)
    row_scales = size * (0.5 + torch.rand(rows, generator=generator))
    if format.divides_by_global_scale:
        row_scales = 1 / row_scales
    return QuantizedTensor(codes, (scales / size).to(torch.float8_e4m3fn), row_scales, format)


def random_fp8(rows: int, columns: int, seed: int = 0) -> QuantizedTensor:
    generator = generator_of(seed, rows, columns)
    codes = (100 * torch.randn((rows, columns), generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
    row_scales = (0.5 + torch.rand(rows, generator=generator)) / (100 * columns**0.5)
    return QuantizedTensor(codes, None, row_scales, FP8)


def random_float(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=generator_of(seed, rows, columns)) / columns**0.5


def random_stack(
    format: Format, num_matrices: int, rows: int, columns: int, seed: int = 0
) -> QuantizedTensor:
    return stack([random_fp4(format, rows, columns, seed * 1000 + i) for i in range(num_matrices)])


def every_kind(rows: int, columns: int) -> dict[str, CpuMatrix]:
    """Those whose block size divides the columns."""
    matrices = {
        format.name: prepare(random_fp4(format, rows, columns))
        for format in FP4_FORMATS
        if format.block_size and columns % format.block_size == 0
    }
    return matrices | {
        "fp8": prepare(random_fp8(rows, columns)),
        "int8": prepare(random_float(rows, columns)),
        "bf16": prepare(random_float(rows, columns), "bf16"),
    }


def takes_floats(matrix: CpuMatrix) -> bool:
    """Whether it is multiplied with float32, not with activations that are quantized to int8."""
    return matrix.kind in (Kind.FP8, Kind.BFLOAT16, Kind.FLOAT32)


def as_words(x: Tensor) -> Tensor:
    """float64 of what x [T, K] becomes in blocks of 32 columns: int8 times a scale, or two words of that in
    blocks with a magnitude above 3 root mean squares of the row."""
    exact = x.double()
    bounds = 3 * exact.square().mean(dim=1).sqrt().view(-1, 1, 1)
    blocks = torch.nn.functional.pad(exact, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    steps = largest / torch.where(largest > bounds, 127 * 128, 127)
    rounded = (blocks / steps.masked_fill(steps == 0, 1)).round() * steps
    return rounded.flatten(1)[:, : x.shape[1]]
