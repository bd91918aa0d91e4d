"""A request of an API key: what it has used, and what is reserved for it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from nybble.server.access.account import Account
from nybble.server.access.prices import Prices
from nybble.server.access.usage_ledger import LedgerEntry, end_of_day


@dataclass
class _Tokens:
    prompt: int = 0
    cached: int = 0
    completion: int = 0


class Visit:
    def __init__(self, name: str, account: Account, prices: Prices) -> None:
        self.name = name
        self._account = account
        self._prices = prices
        self._used: dict[int, _Tokens] = defaultdict(_Tokens)  # by day: a request may run past midnight
        self._reserved_prompt = self._reserved_completion = 0

    def reserve(self, num_prompt: int, num_completion: int) -> None:
        """What the request may use. Raises TooManyRequestsError: more than the key's limits leave."""
        self._account.reserve(num_prompt, num_completion)
        self._reserved_prompt += num_prompt
        self._reserved_completion += num_completion

    def reserve_token(self) -> bool:
        """One token more for an answer; False if the key's limits leave none."""
        is_reserved = self._account.try_reserve(0, 1)
        self._reserved_completion += is_reserved
        return is_reserved

    def charge_prompt(self, num_tokens: int, num_cached: int) -> None:
        self._release(min(num_tokens, self._reserved_prompt), 0)
        used = self._used[self._account.charge(num_tokens, num_cached, 0)]
        used.prompt += num_tokens
        used.cached += num_cached

    def charge_token(self) -> None:
        self._release(0, min(1, self._reserved_completion))
        self._used[self._account.charge(0, 0, 1)].completion += 1

    def end(self) -> None:
        self._release(self._reserved_prompt, self._reserved_completion)
        self._account.end()

    def entries(self, unix_time: float) -> list[LedgerEntry]:
        """What it has used, by day, for a request that ends at `unix_time`."""
        return [self._entry(min(unix_time, end_of_day(day)), used) for day, used in self._used.items()]

    def _release(self, num_prompt: int, num_completion: int) -> None:
        self._account.release(num_prompt, num_completion)
        self._reserved_prompt -= num_prompt
        self._reserved_completion -= num_completion

    def _entry(self, unix_time: float, used: _Tokens) -> LedgerEntry:
        return LedgerEntry(
            time=unix_time,
            key=self.name,
            prompt_tokens=used.prompt,
            cached_tokens=used.cached,
            completion_tokens=used.completion,
            cost=self._prices.cost(used.prompt, used.cached, used.completion),
        )
