"""The one tolerance of the tests: largest and RMS error, in units of the expected tensor's RMS."""

from __future__ import annotations

import torch
from torch import Tensor

_NUM_SHOWN = 5


def assert_close(actual: Tensor, expected: Tensor, *, max_error: float, rms_error: float) -> None:
    """Compare in float64. Both bounds are relative to the RMS of `expected`; an expected tensor of
    zeros must be met exactly. Shapes must agree, and every number must be finite."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    got, want = actual.detach().double().cpu(), expected.detach().double().cpu()
    for name, tensor in (("expected", want), ("actual", got)):
        if not tensor.isfinite().all():
            raise AssertionError(f"{name} has numbers that are not finite at {_first_of(~tensor.isfinite())}")
    if not want.numel():
        return
    error, scale = (got - want).abs(), want.square().mean().sqrt()
    largest, rms = error.max(), error.square().mean().sqrt()
    if largest > max_error * scale or rms > rms_error * scale:
        raise AssertionError(
            f"of the expected RMS {scale:.4g}: largest error {largest / scale:.3g} (allowed {max_error:g}), "
            f"RMS error {rms / scale:.3g} (allowed {rms_error:g})\n{_worst(got, want, error)}"
        )


def _first_of(mask: Tensor) -> str:
    coordinates = mask.nonzero().tolist()
    return f"{coordinates[:_NUM_SHOWN]}, {len(coordinates)} in all"


def _worst(got: Tensor, want: Tensor, error: Tensor) -> str:
    lines = []
    for flat in error.flatten().topk(min(_NUM_SHOWN, error.numel())).indices:
        at = tuple(int(i) for i in torch.unravel_index(flat, error.shape))
        lines.append(f"  {list(at)}: {got[at]:.8g}, expected {want[at]:.8g}")
    return "\n".join(lines)
