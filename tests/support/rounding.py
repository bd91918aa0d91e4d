"""Whether two computations round at the same steps."""

from __future__ import annotations

import torch
from closeness import assert_close
from torch import Tensor

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}


def assert_rounds_alike(actual: Tensor, expected: Tensor) -> None:
    """Of 16-bit floats one in fifty may differ, by one unit in the last place: another order of a sum, or an
    approximate function, tips few roundings; a rounding left out tips one in four. float32 is close."""
    assert actual.dtype == expected.dtype
    if actual.dtype == torch.float32:
        assert_close(actual, expected, max_error=1e-5, rms_error=1e-6)
        return
    assert_close(actual, expected, max_error=0.1, rms_error=0.01)
    bits = _BITS[actual.dtype]
    units = (actual.cpu().view(bits).int() - expected.cpu().view(bits).int()).abs()
    differ = units[actual.cpu() != expected.cpu()]
    assert len(differ) <= actual.numel() / 50, f"{len(differ)} of {actual.numel()} differ"
    assert (differ == 1).all(), f"by up to {differ.max()} units in the last place"
