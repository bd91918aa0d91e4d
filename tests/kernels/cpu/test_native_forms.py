from __future__ import annotations

import gc
from dataclasses import dataclass

from nybble.kernels.cpu.native_forms import NativeForms


@dataclass(frozen=True)
class Value:
    number: int


def test_a_form_is_made_once_and_lives_as_long_as_its_value() -> None:
    made = []

    def make(value: Value) -> list[int]:
        made.append(value.number)
        return [value.number]

    forms = NativeForms(make)
    one, equal = Value(1), Value(1)
    assert forms(one) is forms(one)
    assert forms(equal) is not forms(one)
    assert made == [1, 1]
    del one
    gc.collect()
    assert len(forms) == 1
    assert forms(equal) == [1]
    assert made == [1, 1]
