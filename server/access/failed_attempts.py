"""How many wrong API keys an address may try."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from nybble.server.errors import TooManyRequestsError

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_MINUTE = 60.0
_MAX_REMEMBERED = 10_000  # addresses, and pairs of address and key; the oldest are forgotten


class FailedAttempts:
    """An address over its limit is refused until its minute is over, whatever key it gives.

    But for keys that it has used before: behind a proxy, one client with a wrong key must not shut out the
    others. So those who try learn nothing, not even from a right guess.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        """limit: within a minute from the first one; 0 is none. `clock` gives seconds."""
        self._limit = limit
        self._clock = clock
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()  # since when, how many
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()

    def check(self, address: str, key_name: str | None) -> None:
        """Take note of an attempt, None for a key that does not exist. Raises TooManyRequestsError."""
        if not self._limit:
            return
        network = _network(address)
        start, count = self._failures.get(network, (self._clock(), 0))
        rest = start + _MINUTE - self._clock()
        if rest <= 0:
            start, count = self._clock(), 0
        if count >= self._limit and (network, key_name) not in self._known:
            _remember(self._failures, network, (start, count))
            message = f"{count} unknown API keys came from this address within a minute"
            raise TooManyRequestsError(message, rest, "too_many_failed_attempts")
        if key_name is None:
            _remember(self._failures, network, (start, count + 1))
        else:
            _remember(self._known, (network, key_name), None)


def _network(address: str) -> str:
    """Of IPv6 the first 64 bits, all of whose addresses one client may have."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))


def _remember(memory: OrderedDict[_Key, _Value], key: _Key, value: _Value) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > _MAX_REMEMBERED:
        memory.popitem(last=False)
