"""Ends a text at the first stop string, wherever the pieces it arrives in are cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Holds back a tail that may yet become a stop string. The stop string that is complete first wins,
    the longest of several that end together: what a reader of single characters would see."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = stop_strings
        self._held = ""
        self.has_matched = False

    def feed(self, text: str) -> str:
        """The text that is certain now. Once matched, nothing more comes out."""
        if not self._stop_strings:
            return text
        if self.has_matched:
            return ""
        self._held += text
        start = self._match_start()
        if start is not None:
            self.has_matched = True
            released, self._held = self._held[:start], ""
            return released
        keep = self._num_undecided()
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def finish(self) -> str:
        """The text ended: what was held back is text after all."""
        released, self._held = self._held, ""
        return released

    def _match_start(self) -> int | None:
        found = [(self._held.find(stop), len(stop)) for stop in self._stop_strings]
        ends = [(start + length, start) for start, length in found if start >= 0]
        return min(ends)[1] if ends else None

    def _num_undecided(self) -> int:
        """Length of the longest tail that begins a stop string."""
        return max(map(self._overlap, self._stop_strings), default=0)

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        sizes = range(longest, 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)
