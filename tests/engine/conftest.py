from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nybble.engine.scheduling.scheduler import Scheduler


@pytest.fixture(autouse=True)
def no_block_is_lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test, check every scheduler that it made, but those that it has seen fail the check."""
    schedulers: list[Scheduler] = []
    unsound: list[Scheduler] = []
    init, check = Scheduler.__init__, Scheduler.check

    def noted_init(self: Scheduler, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        schedulers.append(self)

    def noted_check(self: Scheduler) -> None:
        try:
            check(self)
        except AssertionError:
            unsound.append(self)
            raise

    monkeypatch.setattr(Scheduler, "__init__", noted_init)
    monkeypatch.setattr(Scheduler, "check", noted_check)
    yield
    for scheduler in schedulers:
        if not any(scheduler is other for other in unsound):
            check(scheduler)
