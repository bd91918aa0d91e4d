"""A priority queue from which any item can be taken."""

from __future__ import annotations

import heapq
import itertools
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

_Entry = tuple[Any, int, Item]  # key, order of arrival, item

_MIN_COMPACTED = 16  # below that many entries, stale ones cost nothing


class RemovableHeap(Generic[Item]):
    """Items with comparable keys, the least first, of equal keys the first to come. An item is in it once.

    Putting, moving and removing take O(log n), amortized: an entry that no longer counts stays in the
    heap until it comes to the top, or until such entries are the majority.
    """

    def __init__(self) -> None:
        self._entries: dict[Item, _Entry[Item]] = {}
        self._heap: list[_Entry[Item]] = []
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: Item) -> bool:
        return item in self._entries

    def put(self, item: Item, key: Any) -> None:
        """Add an item, or move it to another key."""
        entry = self._entries[item] = (key, next(self._arrivals), item)
        heapq.heappush(self._heap, entry)
        self._compact()

    def remove(self, item: Item) -> None:
        """Take an item out; one that is not in is ignored."""
        if self._entries.pop(item, None) is not None:
            self._compact()

    def first(self) -> Item:
        """The item with the least key. Raises IndexError if there is none."""
        return self._top()[2]

    def first_key(self) -> Any:
        """The least key. Raises IndexError if there is none."""
        return self._top()[0]

    def _top(self) -> _Entry[Item]:
        while self._entries.get(self._heap[0][2]) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0]

    def _compact(self) -> None:
        if len(self._heap) > max(2 * len(self._entries), _MIN_COMPACTED):
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
