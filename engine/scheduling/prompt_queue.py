"""Whose prompt is computed next.

Prompts stand in lines, one for each priority and tenant; answers that were begun and interrupted have lines
of their own, before the others of their priority. A turn is some tokens of one prompt. It goes to the line
of the best priority, among equals to the tenant that has been served least (`fair_share.py`), and within the
line alternately to the oldest prompt and to the shortest: so a short one need not wait for a long one, and a
long one gets half of its line's turns once it is the oldest. All of that takes O(log n).
"""

from __future__ import annotations

from collections.abc import Iterator

from nybble.engine.scheduling.fair_share import FairShare
from nybble.engine.scheduling.removable_heap import RemovableHeap
from nybble.engine.scheduling.sequence import Sequence

_LineName = tuple[int, bool, str]  # priority, whether new, tenant


class PromptQueue:
    """Sequences with more than a decode to compute: waiting for admission, or admitted and prefilling."""

    def __init__(self, shares: FairShare) -> None:
        self._shares = shares
        self._names: dict[Sequence, _LineName] = {}
        self._lines: dict[_LineName, _Line] = {}
        self._all: RemovableHeap[_LineName] = RemovableHeap()
        self._prefilling: RemovableHeap[_LineName] = RemovableHeap()  # lines that have admitted prompts
        self.num_prefilling = 0

    @property
    def num_waiting(self) -> int:
        return len(self._names) - self.num_prefilling

    def waiting(self) -> Iterator[Sequence]:
        """In no order."""
        return (s for s, name in self._names.items() if s in self._lines[name].waiting)

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Let a sequence wait that has about `num_tokens` to compute."""
        name = sequence.priority, not sequence.num_output_tokens, sequence.tenant
        self._names[sequence] = name
        if name not in self._lines:
            self._lines[name] = _Line()
            self._all.put(name, self._key(name))
        self._lines[name].waiting.put(sequence, num_tokens)

    def admit(self, sequence: Sequence, num_tokens: int) -> None:
        """Move a waiting sequence to those that prefill; exactly `num_tokens` are to be computed."""
        name = self._names[sequence]
        line = self._lines[name]
        line.waiting.remove(sequence)
        line.prefilling.put(sequence, num_tokens)
        self._prefilling.put(name, self._key(name))
        self.num_prefilling += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands; one that is not here is ignored."""
        name = self._names.pop(sequence, None)
        if name is None:
            return
        line = self._lines[name]
        self.num_prefilling -= sequence in line.prefilling
        line.remove(sequence)
        if not line.prefilling:
            self._prefilling.remove(name)
            if not line.waiting:
                self._all.remove(name)
                del self._lines[name]

    def next(self, can_admit: bool) -> Sequence | None:
        """Whose turn it is; without `can_admit`, of those that prefill already."""
        lines = self._all if can_admit else self._prefilling
        if not lines:
            return None
        return self._lines[self._first(lines)].next(can_admit)

    def end_turn(self, sequence: Sequence, num_left: int, can_admit: bool) -> None:
        """Note that the one whose turn it was has got tokens; with none left it is taken out."""
        line = self._lines[self._names[sequence]]
        line.num_turns[can_admit] += 1
        if num_left:
            line.prefilling.put(sequence, num_left)
        else:
            self.remove(sequence)

    def _key(self, name: _LineName) -> tuple[int, bool, int]:
        priority, is_new, tenant = name
        return priority, is_new, self._shares.served(tenant)

    def _first(self, lines: RemovableHeap[_LineName]) -> _LineName:
        """The first line by its key of now. Keys only grow, so a first one that is up to date is first."""
        while lines.first_key() != (key := self._key(lines.first())):
            lines.put(lines.first(), key)
        return lines.first()


class _Line:
    """`num_turns`: for each value of `can_admit`, since what a turn was about to admit must stay next."""

    def __init__(self) -> None:
        self.waiting = _Prompts()
        self.prefilling = _Prompts()
        self.num_turns = {False: 0, True: 0}

    def remove(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.prefilling.remove(sequence)

    def next(self, can_admit: bool) -> Sequence:
        groups = (self.prefilling, self.waiting) if can_admit else (self.prefilling,)
        is_turn_of_oldest = self.num_turns[can_admit] % 2 == 0
        heaps = [group.by_age if is_turn_of_oldest else group.by_length for group in groups if group]
        return min(heaps, key=lambda heap: heap.first_key()).first()


class _Prompts:
    def __init__(self) -> None:
        self.by_age: RemovableHeap[Sequence] = RemovableHeap()
        self.by_length: RemovableHeap[Sequence] = RemovableHeap()

    def __len__(self) -> int:
        return len(self.by_age)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self.by_age

    def put(self, sequence: Sequence, num_tokens: int) -> None:
        """Add a sequence, or change what it has to compute."""
        if sequence not in self.by_age:
            self.by_age.put(sequence, sequence.arrival)
        self.by_length.put(sequence, (num_tokens, sequence.arrival))

    def remove(self, sequence: Sequence) -> None:
        self.by_age.remove(sequence)
        self.by_length.remove(sequence)
