"""C structures that stand for Python values, made once for each."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")
S = TypeVar("S")


class NativeForms(Generic[V, S]):
    """Calls `make` for a value at first, and then gives what that returned, as long as the value lives.

    A value is known by its identity: comparing the tensors in it would take longer than the operation. So it
    must not change.
    """

    def __init__(self, make: Callable[[V], S]) -> None:
        self._make = make
        self._forms: dict[int, S] = {}

    def __call__(self, value: V) -> S:
        form = self._forms.get(id(value))
        if form is None:
            form = self._forms[id(value)] = self._make(value)
            weakref.finalize(value, self._forms.pop, id(value))
        return form

    def __len__(self) -> int:
        return len(self._forms)
