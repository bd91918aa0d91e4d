"""How long the parts of a request took, as clients of llama.cpp read it."""

from __future__ import annotations

import time
from collections.abc import Callable

from nybble.engine.messages import TokenEvent
from nybble.server.requests.schemas import Timings


class RequestTimer:
    """Begins with the request. Tell it of every token; `clock` gives seconds.

    Where a request has several prompts, their time ends when the last of them is computed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._first: float | None = None  # when the first token came
        self._last = self._prompt_end = self._start
        self._queue_time = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the request."""
        return self._clock() - self._start

    def time_left(self, timeout: float | None) -> float | None:
        """Seconds of a timeout, if the request has one: of all its answers together."""
        return None if timeout is None else timeout - self.elapsed

    def note_token(self, event: TokenEvent, ends_prompt: bool) -> None:
        """ends_prompt: whether it is the first one after a prompt."""
        self._last = self._clock()
        if ends_prompt:
            self._prompt_end = self._last
        if self._first is None:
            self._first = self._last
            self._queue_time = event.queue_time or 0.0

    def timings(self, num_prompt: int, num_cached: int, num_completion: int) -> Timings:
        """Of all tokens so far."""
        first = self._last if self._first is None else self._first
        prompt_ms = max(self._prompt_end - self._start - self._queue_time, 0.0) * 1e3
        predicted_ms = (self._last - first) * 1e3
        num_computed, num_after_first = num_prompt - num_cached, max(num_completion - 1, 0)
        return Timings(
            cache_n=num_cached,
            prompt_n=num_computed,
            prompt_ms=round(prompt_ms, 3),
            prompt_per_token_ms=_ratio(prompt_ms, num_computed),
            prompt_per_second=_ratio(num_computed * 1e3, prompt_ms),
            predicted_n=num_completion,
            predicted_ms=round(predicted_ms, 3),
            predicted_per_token_ms=_ratio(predicted_ms, num_after_first),
            predicted_per_second=_ratio(num_after_first * 1e3, predicted_ms),
            queue_ms=round(self._queue_time * 1e3, 3),
        )


def _ratio(value: float, divisor: float) -> float:
    return round(value / divisor, 3) if divisor > 0 else 0.0
