from __future__ import annotations

import numpy as np

from nybble.engine.scheduling.block_table import BlockTable


def test_grows_in_order() -> None:
    table = BlockTable()
    expected: list[int] = []
    for count in (0, 3, 1, 12, 1, 100, 0, 7):
        blocks = list(range(len(expected), len(expected) + count))
        table.extend(blocks)
        expected += blocks
        assert table.tolist() == expected
        assert len(table) == len(expected)
    assert table.array.dtype == np.int32


def test_an_array_stays_as_it_was_when_the_table_grows() -> None:
    table = BlockTable()
    table.extend([5, 6])
    before = table.array
    for block in range(100):
        table.extend([block])
    assert before.tolist() == [5, 6]


def test_growing_by_one_does_not_copy_each_time() -> None:
    table = BlockTable()
    buffers = set()
    for block in range(10_000):
        table.extend([block])
        buffers.add(table.array.ctypes.data)
    assert len(buffers) < 20
