"""Masks that take too long, and what becomes of the others."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence

import pytest

from nybble.engine.grammar.mask_thread import MaskThread

LIMIT = 0.05


class Source:
    """A state whose masks take a while: the processor is at work, or the thread just waits."""

    def __init__(self, work: float = 0.0, pause: float = 0.0) -> None:
        self._work = work
        self._pause = pause
        self.asked: list[tuple[int, ...]] = []
        self.has_given_up = False

    def allowed_words(self, drafts: Sequence[int] = ()) -> None:
        self.asked.append(tuple(drafts))
        time.sleep(self._pause)
        start = time.thread_time()
        while time.thread_time() - start < self._work:
            pass

    def give_up(self) -> None:
        self.has_given_up = True


class Broken(Source):
    def allowed_words(self, drafts: Sequence[int] = ()) -> None:
        raise ValueError("broken")


def test_all_are_computed_in_one_thread_again_and_again() -> None:
    masks, source, number = MaskThread(LIMIT), Source(), threading.active_count()
    for _ in range(3):
        masks.compute([(source, ()), (source, (1, 2))])
    masks.compute([])
    assert source.asked == [(), (1, 2)] * 3 and not source.has_given_up
    assert threading.active_count() == number + 1


def test_one_that_takes_too_long_gives_up_and_the_rest_are_computed() -> None:
    masks = MaskThread(LIMIT)
    first, slow, last = Source(), Source(work=2.0), Source()
    start = time.monotonic()
    masks.compute([(first, ()), (slow, ()), (slow, (1,)), (last, ()), (last, (1,))])
    assert time.monotonic() - start < 2.0, "it was waited for"
    assert slow.has_given_up and slow.asked == [()]
    assert not first.has_given_up and not last.has_given_up
    assert first.asked == [()] and last.asked == [(), (1,)]
    masks.compute([(first, (3,))])
    assert first.asked == [(), (3,)]


def test_a_thread_that_gets_no_processor_is_waited_for() -> None:
    masks, waiting = MaskThread(LIMIT), Source(pause=5 * LIMIT)
    masks.compute([(waiting, ())])
    assert not waiting.has_given_up


def test_many_fast_ones_may_take_long_together() -> None:
    masks, sources = MaskThread(LIMIT), [Source(work=LIMIT / 3) for _ in range(6)]
    masks.compute([(source, ()) for source in sources])
    assert not any(source.has_given_up for source in sources)


def test_what_goes_wrong_is_raised_and_the_next_is_computed() -> None:
    masks, source = MaskThread(LIMIT), Source()
    with pytest.raises(ValueError, match="broken"):
        masks.compute([(Broken(), ()), (source, ())])
    masks.compute([(source, (7,))])
    assert source.asked == [(7,)]


def test_the_thread_ends_with_its_owner() -> None:
    masks = MaskThread(LIMIT)
    masks.compute([(Source(), ())])
    (thread,) = [thread for thread in threading.enumerate() if thread is masks._work._thread]  # type: ignore[union-attr]
    del masks
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
