from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.scheduling.removable_heap import RemovableHeap


def _drain(heap: RemovableHeap[str]) -> list[str]:
    items = []
    while heap:
        items.append(heap.first())
        heap.remove(heap.first())
    return items


def test_the_least_comes_first_and_of_equals_the_first_to_come() -> None:
    heap: RemovableHeap[str] = RemovableHeap()
    for item, key in (("c", 2), ("a", 1), ("d", 2), ("b", 1)):
        heap.put(item, key)
    assert _drain(heap) == ["a", "b", "c", "d"]


def test_an_item_moves_to_its_last_key() -> None:
    heap: RemovableHeap[str] = RemovableHeap()
    heap.put("a", 1)
    heap.put("b", 2)
    heap.put("a", 3)
    assert (heap.first(), heap.first_key(), len(heap)) == ("b", 2, 2)


def test_removing_what_is_not_there_changes_nothing() -> None:
    heap: RemovableHeap[str] = RemovableHeap()
    heap.put("a", 1)
    heap.remove("b")
    assert "a" in heap and "b" not in heap
    assert _drain(heap) == ["a"]


def test_an_empty_heap_has_no_first() -> None:
    heap: RemovableHeap[str] = RemovableHeap()
    with pytest.raises(IndexError):
        heap.first()
    heap.put("a", 1)
    heap.remove("a")
    with pytest.raises(IndexError):
        heap.first_key()


def test_what_was_removed_is_not_kept() -> None:
    heap: RemovableHeap[int] = RemovableHeap()
    heap.put(-1, -1)  # stays at the top, so that nothing below comes there
    for item in range(1000):
        heap.put(item, item)
        heap.remove(item)
    assert len(heap._heap) < 20


_actions = st.lists(st.tuples(st.sampled_from(["put", "remove"]), st.integers(0, 9), st.integers(0, 5)))


@settings(max_examples=200, deadline=None)
@given(_actions)
def test_like_a_sorted_list(actions: list[tuple[str, int, int]]) -> None:
    heap: RemovableHeap[int] = RemovableHeap()
    model: dict[int, tuple[int, int]] = {}  # item -> key, time
    for time, (action, item, key) in enumerate(actions):
        if action == "put":
            heap.put(item, key)
            model[item] = key, time
        else:
            heap.remove(item)
            model.pop(item, None)
        assert len(heap) == len(model)
        if model:
            first = min(model, key=lambda item: model[item])
            assert (heap.first(), heap.first_key()) == (first, model[first][0])
