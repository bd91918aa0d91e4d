"""How much each tenant has been served, so that whoever had least is next.

The counters of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a tenant's counter
grows by each token that is run for it, and turns go to the least. That paper lifts the counter of a tenant
that comes back, lest it claim what it did not ask for while it was away. Here, as with the virtual time of
Goyal et al., "Start-time Fair Queuing" (SIGCOMM 1996), one rule does that for everybody: nobody is ever
more than `max_lag` tokens behind the foremost.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

_MAX_ABSENT = 1000  # tenants remembered without requests


class FairShare:
    def __init__(self, max_lag: int) -> None:
        self._max_lag = max_lag
        self._foremost = 0
        self._served: dict[str, int] = {}
        self._num_requests: Counter[str] = Counter()
        self._absent: OrderedDict[str, None] = OrderedDict()  # remembered, without requests

    def served(self, tenant: str) -> int:
        """The counter of a tenant that has requests. It only ever grows."""
        return self._served[tenant]

    def arrive(self, tenant: str) -> None:
        """Note one more request of a tenant."""
        self._num_requests[tenant] += 1
        self._absent.pop(tenant, None)
        self._served[tenant] = self._lifted(tenant)

    def leave(self, tenant: str) -> None:
        """Note that a request of a tenant has ended."""
        self._num_requests[tenant] -= 1
        if not self._num_requests[tenant]:
            del self._num_requests[tenant]
            self._absent[tenant] = None
            self._forget()

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Note that tokens are run for a tenant that has requests."""
        served = self._served[tenant] = self._lifted(tenant) + num_tokens
        self._foremost = max(self._foremost, served)

    def __len__(self) -> int:
        """How many tenants are remembered."""
        return len(self._served)

    def _lifted(self, tenant: str) -> int:
        return max(self._served.get(tenant, 0), self._foremost - self._max_lag)

    def _forget(self) -> None:
        """Drop the longest absent, while they are too many or are as far behind as the unknown."""
        while self._absent:
            tenant = next(iter(self._absent))
            is_ahead = self._served[tenant] > self._foremost - self._max_lag
            if is_ahead and len(self._absent) <= _MAX_ABSENT:
                return
            del self._absent[tenant], self._served[tenant]
