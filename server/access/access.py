"""Who may use the server: keys as they are in force, and an account for each."""

from __future__ import annotations

import time
from collections.abc import Iterable

from nybble.server.access.account import Account, Clock
from nybble.server.access.api_keys import APIKey, find_key
from nybble.server.access.failed_attempts import FailedAttempts
from nybble.server.access.prices import Prices
from nybble.server.access.usage_ledger import DayUse, UsageLedger, day_of
from nybble.server.access.visit import Visit
from nybble.server.errors import ForbiddenError, UnauthorizedError

_BEARER = "bearer"


class Access:
    """The keys of a server. `wall_clock` gives Unix time, `clock` seconds."""

    def __init__(
        self,
        keys: Iterable[APIKey],
        ledger: UsageLedger,
        prices: Prices,
        wall_clock: Clock = time.time,
        clock: Clock = time.monotonic,
        max_failed_attempts: int = 0,
    ) -> None:
        """max_failed_attempts: of one address within a minute; 0 is without limit.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        self._ledger = ledger
        self._prices = prices
        self._wall_clock = wall_clock
        self._clock = clock
        self._attempts = FailedAttempts(max_failed_attempts, clock)
        self._keys: list[APIKey] = []
        self._accounts: dict[str, Account] = {}
        self._first_day = day_of(wall_clock())
        self._used_before = ledger.sums(self._first_day)  # by keys that may come back, too
        self.replace_keys(keys)

    def replace_keys(self, keys: Iterable[APIKey]) -> None:
        """From now on. A key of the same name as before goes on with its account; what runs is finished."""
        self._keys = list(keys)
        for key in self._keys:
            account = self._accounts.get(key.name)
            if account is None:
                self._accounts[key.name] = self._new_account(key)
            else:
                account.key = key

    def enter(self, authorization: list[str], address: str = "") -> Visit:
        """Begin a request; `leave` ends it.

        authorization: the values of all headers of that name; address: of the client, as far as it is known.

        Raises:
            UnauthorizedError: no key, or none of ours.
            ForbiddenError: a key that is switched off.
            TooManyRequestsError: a limit of the key is reached, or that of failed attempts.
        """
        key = find_key(self._keys, _secret(authorization))
        self._attempts.check(address, key.name if key else None)
        if key is None:
            raise UnauthorizedError("the API key is not known here", code="invalid_api_key")
        if not key.enabled:
            raise ForbiddenError("this API key is disabled", code="api_key_disabled")
        account = self._accounts[key.name]
        account.begin()
        return Visit(key.name, account, self._prices)

    def leave(self, visit: Visit) -> None:
        """End a request, and write down what it has used."""
        visit.end()
        for entry in visit.entries(self._wall_clock()):
            self._ledger.append(entry)

    def _new_account(self, key: APIKey) -> Account:
        is_first_day = day_of(self._wall_clock()) == self._first_day
        used = self._used_before.pop(key.name, DayUse()) if is_first_day else DayUse()
        return Account(key, used, self._prices, self._wall_clock, self._clock)


def _secret(authorization: list[str]) -> str:
    """Raises UnauthorizedError unless it is one bearer token."""
    scheme, _, secret = (authorization[0] if len(authorization) == 1 else "").partition(" ")
    if scheme.lower() != _BEARER or not secret.strip():
        message = "this server needs an API key: send one header 'Authorization: Bearer KEY'"
        raise UnauthorizedError(message, code="invalid_api_key")
    return secret.strip()
