"""`from guarded_memory import guarded as guarded`: float tensors that an operation makes have guards."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

_GUARD = 64
_MARK = 12345.0


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty(shape) is NaN within numbers, which are found as they were at the end of the test."""
    areas: list[Tensor] = []
    unguarded = torch.empty

    def empty(*arguments: object, **options: object) -> Tensor:
        shape = arguments[0]
        if options or len(arguments) != 1 or not isinstance(shape, tuple):
            return unguarded(*arguments, **options)  # type: ignore[call-overload,no-any-return]
        area = torch.full((math.prod(shape) + 2 * _GUARD,), _MARK)
        areas.append(area)
        return area[_GUARD:-_GUARD].fill_(torch.nan).view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    assert areas
    for area in areas:
        assert (area[:_GUARD] == _MARK).all()
        assert (area[-_GUARD:] == _MARK).all()
