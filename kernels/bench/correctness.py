"""Whether a benchmarked op computes what it should: only then is its speed worth knowing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deviation:
    """The largest and the RMS error, in units of the expected numbers' RMS; infinite where a number is not
    finite or the shape is another."""

    max_error: float
    rms_error: float

    def __str__(self) -> str:
        return f"largest error {self.max_error:.3g}, RMS error {self.rms_error:.3g}, of the expected RMS"


@dataclass(frozen=True)
class Tolerance:
    """The largest deviation that is still right, in the same units."""

    max_error: float
    rms_error: float

    def admits(self, deviation: Deviation) -> bool:
        return deviation.max_error <= self.max_error and deviation.rms_error <= self.rms_error


# Sums in float32 of products that are exact or nearly so, rounded to bfloat16 at the end (2^-9), or twice.
ROUNDED_ONCE = Tolerance(max_error=0.03, rms_error=0.004)
ROUNDED_TWICE = Tolerance(max_error=0.06, rms_error=0.008)
# Activations were quantized on the way, to E4M3 with a scale for 32 columns, or to E2M1 with one for 16.
QUANTIZED_TO_8_BITS = Tolerance(max_error=0.3, rms_error=0.06)
QUANTIZED_TO_4_BITS = Tolerance(max_error=1.0, rms_error=0.2)
EXACT = Tolerance(max_error=0.0, rms_error=0.0)


def deviation(actual: Tensor, expected: Tensor, rows: Tensor | None = None) -> Deviation:
    """In float64. With `rows`, expected are those rows of actual; all of it must be finite."""
    is_finite = bool(actual.isfinite().all())
    actual = actual if rows is None else actual[rows]
    if actual.shape != expected.shape or not is_finite:
        return Deviation(float("inf"), float("inf"))
    want = expected.double()
    error = (actual.double() - want).abs()
    scale = float(want.square().mean().sqrt()) or 1.0
    return Deviation(float(error.max()) / scale, float(error.square().mean().sqrt()) / scale)


def checked_rows(num_rows: int, most: int = 256) -> Tensor:
    """int64: the rows to compare, evenly spread, first and last among them."""
    return torch.unique(torch.linspace(0, num_rows - 1, min(num_rows, most)).round().long())  # type: ignore[no-any-return]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, new tensors hold NaN or the largest integer: a number that no kernel stores is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
