"""Who may use the server, and how much: keys, their limits, and what they have used."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from nybble.server.access.api_keys import APIKey, find_key
from nybble.server.access.prices import Prices
from nybble.server.access.usage_ledger import DayUse, LedgerEntry, UsageLedger, day_of
from nybble.server.errors import ForbiddenError, TooManyRequestsError, UnauthorizedError

_MINUTE, _DAY = 60.0, 86400
_BEARER = "bearer"

Clock = Callable[[], float]


class Access:
    """The keys of a server. `wall_clock` gives Unix time, `clock` seconds."""

    def __init__(
        self,
        keys: Iterable[APIKey],
        ledger: UsageLedger,
        prices: Prices,
        wall_clock: Clock = time.time,
        clock: Clock = time.monotonic,
    ) -> None:
        """Raises LedgerError: the ledger cannot be read."""
        self._keys = list(keys)
        self._ledger = ledger
        self._prices = prices
        self._wall_clock = wall_clock
        today = day_of(wall_clock())
        sums = ledger.sums(today)
        self._accounts = {
            key.name: Account(key, sums.get(key.name, DayUse()), wall_clock, clock) for key in self._keys
        }

    def enter(self, authorization: list[str]) -> Visit:
        """Begin a request; `leave` ends it. `authorization`: the values of all headers of that name.

        Raises:
            UnauthorizedError: no key, or none of ours.
            ForbiddenError: a key that is switched off.
            TooManyRequestsError: a limit of the key is reached.
        """
        key = find_key(self._keys, _secret(authorization))
        if key is None:
            raise UnauthorizedError("the API key is not known here", code="invalid_api_key")
        if not key.enabled:
            raise ForbiddenError("this API key is disabled", code="api_key_disabled")
        account = self._accounts[key.name]
        account.begin()
        return Visit(key.name, account, self._prices)

    def leave(self, visit: Visit) -> None:
        """End a request, and write down what it has used."""
        visit.account.end()
        if visit.num_prompt or visit.num_completion:
            self._ledger.append(visit.entry(self._wall_clock()))


class Visit:
    """A request of a key, and what it has used so far."""

    def __init__(self, name: str, account: Account, prices: Prices) -> None:
        self.name = name
        self.account = account
        self.num_prompt = 0
        self.num_cached = 0
        self.num_completion = 0
        self._prices = prices

    def charge(self, num_prompt: int = 0, num_cached: int = 0, num_completion: int = 0) -> None:
        """Counts against the key's limits at once."""
        self.num_prompt += num_prompt
        self.num_cached += num_cached
        self.num_completion += num_completion
        cost = self._prices.cost(num_prompt, num_cached, num_completion)
        self.account.charge(num_prompt + num_completion, cost)

    def entry(self, unix_time: float) -> LedgerEntry:
        return LedgerEntry(
            time=unix_time,
            key=self.name,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.num_cached,
            completion_tokens=self.num_completion,
            cost=self._prices.cost(self.num_prompt, self.num_cached, self.num_completion),
        )


class Account:
    """The limits of one key, and where it stands."""

    def __init__(self, key: APIKey, used_today: DayUse, wall_clock: Clock, clock: Clock) -> None:
        self._key = key
        self._used = used_today
        self._wall_clock = wall_clock
        self._clock = clock
        self._day = day_of(wall_clock())
        self._num_open = 0
        self._starts: deque[float] = deque()  # of the last minute, refused requests left out

    def begin(self) -> None:
        """Raises TooManyRequestsError, with the time after which it may be tried again."""
        self._check_day()
        self._check_concurrency()
        self._check_rate()
        self._num_open += 1
        if self._key.requests_per_minute is not None:
            self._starts.append(self._clock())

    def end(self) -> None:
        self._num_open -= 1

    def charge(self, num_tokens: int, cost: float) -> None:
        self._turn_day()
        self._used.tokens += num_tokens
        self._used.cost += cost

    def _check_day(self) -> None:
        self._turn_day()
        key, used = self._key, self._used
        limits = (("token", used.tokens, key.tokens_per_day), ("cost", used.cost, key.cost_per_day))
        for what, amount, limit in limits:
            if limit is not None and amount >= limit:
                rest = _DAY - self._wall_clock() % _DAY
                message = f"the API key has reached its {what} limit of the day, {limit:g}"
                raise TooManyRequestsError(message, rest, "insufficient_quota")

    def _check_concurrency(self) -> None:
        limit = self._key.concurrent_requests
        if limit is not None and self._num_open >= limit:
            message = f"the API key has {limit} requests open already, its limit"
            raise TooManyRequestsError(message, code="rate_limit_exceeded")

    def _check_rate(self) -> None:
        limit, now = self._key.requests_per_minute, self._clock()
        while self._starts and self._starts[0] <= now - _MINUTE:
            self._starts.popleft()
        if limit is not None and len(self._starts) >= limit:
            message = f"the API key has made {limit} requests within a minute, its limit"
            raise TooManyRequestsError(message, self._starts[0] + _MINUTE - now, "rate_limit_exceeded")

    def _turn_day(self) -> None:
        today = day_of(self._wall_clock())
        if today != self._day:
            self._day, self._used = today, DayUse()


def _secret(authorization: list[str]) -> str:
    """Raises UnauthorizedError unless it is one bearer token."""
    scheme, _, secret = (authorization[0] if len(authorization) == 1 else "").partition(" ")
    if scheme.lower() != _BEARER or not secret.strip():
        message = "this server needs an API key: send one header 'Authorization: Bearer KEY'"
        raise UnauthorizedError(message, code="invalid_api_key")
    return secret.strip()
