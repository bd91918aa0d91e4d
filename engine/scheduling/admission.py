"""How many requests may wait, and when a refused one should come again."""

from __future__ import annotations

from collections import deque

from nybble.engine.errors import QueueFullError

_NUM_RECENT = 64  # completed requests from which the rate is estimated
_DEFAULT_RETRY_AFTER = 5.0  # seconds, before any rate is known
_MAX_RETRY_AFTER = 60.0  # seconds: nobody knows what is further off


class AdmissionControl:
    """A bounded queue. Times are seconds of a monotonic clock.

    max_waiting: requests beyond it are refused; None is no bound.
    """

    def __init__(self, max_waiting: int | None) -> None:
        self._max_waiting = max_waiting
        self._completions: deque[float] = deque(maxlen=_NUM_RECENT)

    def note_completed(self, now: float) -> None:
        """Note that a request has ended and made room."""
        self._completions.append(now)

    def check(self, num_waiting: int, now: float) -> None:
        """Raise QueueFullError if a request may not join those that wait."""
        if self._max_waiting is not None and num_waiting >= self._max_waiting:
            raise QueueFullError(
                f"{num_waiting} requests are waiting, the most that max_waiting admits",
                self.retry_after(num_waiting, now),
            )

    def retry_after(self, num_waiting: int, now: float) -> float:
        """Seconds until half of those that wait will have been completed, at the recent rate; 1 to 60.

        Half: then a good part of those that were refused finds room at once, and the engine has not run dry.
        """
        if len(self._completions) < 2 or now <= self._completions[0]:
            return _DEFAULT_RETRY_AFTER
        rate = len(self._completions) / (now - self._completions[0])
        return min(max(num_waiting / 2 / rate, 1.0), _MAX_RETRY_AFTER)
