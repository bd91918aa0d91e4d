from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from nybble.server.access.usage_ledger import LedgerEntry, LedgerError, UsageLedger, day_of

DAY = 86400.0


def entry(time: float, key: str = "ann", cost: float = 0.25) -> LedgerEntry:
    return LedgerEntry(time=time, key=key, prompt_tokens=10, cached_tokens=4, completion_tokens=5, cost=cost)


def test_sums_survive_and_are_by_key_and_day(tmp_path: Path) -> None:
    path = tmp_path / "use.jsonl"
    with closing(UsageLedger(path)) as ledger:
        for when in (5 * DAY - 0.5, 5 * DAY, 6 * DAY - 0.5, 6 * DAY):
            ledger.append(entry(when))
        ledger.append(entry(5 * DAY, "bob", cost=1))
    with closing(UsageLedger(path)) as ledger:
        sums = ledger.sums(5)
        assert {key: (use.tokens, use.cost) for key, use in sums.items()} == {
            "ann": (30, 0.5),
            "bob": (15, 1),
        }
        ledger.append(entry(5 * DAY))
        assert ledger.sums(5)["ann"].tokens == 45
    assert path.stat().st_mode & 0o777 == 0o600
    assert day_of(5 * DAY) == 5


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "use.jsonl"
    with closing(UsageLedger(path)) as ledger:
        ledger.append(entry(DAY))
        ledger.append(entry(DAY))
    os.truncate(path, path.stat().st_size - 3)
    with closing(UsageLedger(path)) as ledger:
        assert ledger.sums(1)["ann"].tokens == 15
        ledger.append(entry(DAY))
        assert ledger.sums(1)["ann"].tokens == 30


def test_a_line_that_is_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "use.jsonl"
    path.write_text("{}\n")
    with closing(UsageLedger(path)) as ledger, pytest.raises(LedgerError, match="line 1"):
        ledger.sums(1)


def test_two_servers_do_not_share_one(tmp_path: Path) -> None:
    path = tmp_path / "use.jsonl"
    with closing(UsageLedger(path)), pytest.raises(LedgerError, match="another server"):
        UsageLedger(path)
    UsageLedger(path).close()


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=str(tmp_path)):
        UsageLedger(tmp_path)


def test_a_full_disk_loses_the_line_only(caplog: pytest.LogCaptureFixture) -> None:
    with closing(UsageLedger(Path("/dev/full"))) as ledger:
        ledger.append(entry(DAY))
    assert "/dev/full: a line was lost" in caplog.text
