"""The limits of one API key, and where it stands.

The rule for limits of a day: what is used, what running requests may still use, and what a new one may use
together stay within the limit, or the new one is refused. So requests that run side by side cannot exceed it.
A prompt counts as if none of it were cached until it is known what was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nybble.server.access.api_keys import APIKey
from nybble.server.access.prices import Prices
from nybble.server.access.usage_ledger import DayUse, day_of
from nybble.server.errors import TooManyRequestsError

_MINUTE, _DAY = 60.0, 86400
_SOON = 1.0  # seconds

Clock = Callable[[], float]


class Account:
    """`wall_clock` gives Unix time, `clock` seconds."""

    def __init__(
        self, key: APIKey, used_today: DayUse, prices: Prices, wall_clock: Clock, clock: Clock
    ) -> None:
        self.key = key  # may be replaced by one of the same name
        self._used = used_today
        self._prices = prices
        self._wall_clock = wall_clock
        self._clock = clock
        self._day = day_of(wall_clock())
        self._reserved_prompt = self._reserved_completion = 0  # tokens
        self._num_open = 0
        self._starts: deque[float] = deque()  # of the last minute, refused requests left out

    def begin(self) -> None:
        """Raises TooManyRequestsError, with the time after which it may be tried again."""
        self._check_day()
        self._check_concurrency()
        self._check_rate()
        self._num_open += 1
        if self.key.requests_per_minute is not None:
            self._starts.append(self._clock())

    def end(self) -> None:
        self._num_open -= 1

    def reserve(self, num_prompt: int, num_completion: int) -> None:
        """Raises TooManyRequestsError: there is no room for so many tokens."""
        if not self.try_reserve(num_prompt, num_completion):
            raise self._refusal(num_prompt, num_completion)

    def try_reserve(self, num_prompt: int, num_completion: int) -> bool:
        self._turn_day()
        prompt, completion = self._reserved_prompt + num_prompt, self._reserved_completion + num_completion
        if not self._has_room(prompt, completion):
            return False
        self._reserved_prompt, self._reserved_completion = prompt, completion
        return True

    def release(self, num_prompt: int, num_completion: int) -> None:
        """Of what was reserved."""
        self._reserved_prompt -= num_prompt
        self._reserved_completion -= num_completion

    def charge(self, num_prompt: int, num_cached: int, num_completion: int) -> int:
        """Count as used; returns the day to which it was counted."""
        self._turn_day()
        self._used.tokens += num_prompt + num_completion
        self._used.cost += self._prices.cost(num_prompt, num_cached, num_completion)
        return self._day

    def _has_room(self, num_prompt: int, num_completion: int) -> bool:
        """Whether so much may be used today besides what is used."""
        key, used = self.key, self._used
        if key.tokens_per_day is not None and used.tokens + num_prompt + num_completion > key.tokens_per_day:
            return False
        if key.cost_per_day is None:
            return True
        return used.cost + self._prices.cost(num_prompt, 0, num_completion) <= key.cost_per_day

    def _refusal(self, num_prompt: int, num_completion: int) -> TooManyRequestsError:
        message = (
            f"the request may use {num_prompt + num_completion} tokens, more than is left of the API key's "
            "limits of the day"
        )
        if self._has_room(num_prompt, num_completion):
            message += " while its other requests run"
            return TooManyRequestsError(message, _SOON, "rate_limit_exceeded")
        return TooManyRequestsError(
            f"{message}; a smaller max_tokens may fit", self._rest_of_day(), "insufficient_quota"
        )

    def _check_day(self) -> None:
        self._turn_day()
        key, used = self.key, self._used
        limits = (("token", used.tokens, key.tokens_per_day), ("cost", used.cost, key.cost_per_day))
        for what, amount, limit in limits:
            if limit is not None and amount >= limit:
                message = f"the API key has reached its {what} limit of the day, {limit:g}"
                raise TooManyRequestsError(message, self._rest_of_day(), "insufficient_quota")

    def _check_concurrency(self) -> None:
        limit = self.key.concurrent_requests
        if limit is not None and self._num_open >= limit:
            message = f"the API key has {limit} requests open already, its limit"
            raise TooManyRequestsError(message, code="rate_limit_exceeded")

    def _check_rate(self) -> None:
        limit, now = self.key.requests_per_minute, self._clock()
        while self._starts and self._starts[0] <= now - _MINUTE:
            self._starts.popleft()
        if limit is not None and len(self._starts) >= limit:
            message = f"the API key has made {limit} requests within a minute, its limit"
            raise TooManyRequestsError(message, self._starts[0] + _MINUTE - now, "rate_limit_exceeded")

    def _turn_day(self) -> None:
        today = day_of(self._wall_clock())
        if today != self._day:
            self._day, self._used = today, DayUse()

    def _rest_of_day(self) -> float:
        return _DAY - self._wall_clock() % _DAY
