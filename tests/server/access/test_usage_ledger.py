from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server.access.usage_ledger import LedgerEntry, LedgerError, UsageLedger, day_of

DAY = 86400.0


def entry(time: float, key: str = "ann", cost: float = 0.25) -> LedgerEntry:
    return LedgerEntry(time=time, key=key, prompt_tokens=10, cached_tokens=4, completion_tokens=5, cost=cost)


def test_sums_survive_and_are_by_key_and_day(tmp_path: Path) -> None:
    path = tmp_path / "use.jsonl"
    with closing(UsageLedger(path)) as ledger:
        for when in (5 * DAY - 0.5, 5 * DAY, 6 * DAY - 0.5):
            ledger.append(entry(when))
        ledger.append(entry(5 * DAY, "bob", cost=1))
    with closing(UsageLedger(path)) as ledger:
        sums = ledger.sums(5)
        assert {key: (use.tokens, use.cost) for key, use in sums.items()} == {
            "ann": (30, 0.5),
            "bob": (15, 1),
        }
        assert ledger.sums(4) == {}
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
    with pytest.raises(LedgerError, match=r"use\.jsonl: line 1: "):
        UsageLedger(path)
    path.write_text("")
    UsageLedger(path).close()  # its lock was given up


def test_two_servers_do_not_share_one(tmp_path: Path) -> None:
    path = tmp_path / "use.jsonl"
    with closing(UsageLedger(path)) as ledger:
        ledger.append(entry(5 * DAY))
        for _ in range(2):  # nor after a new file was begun
            with pytest.raises(LedgerError, match="another server"):
                UsageLedger(path)
            ledger.append(entry(6 * DAY))
    UsageLedger(path).close()


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=str(tmp_path)):
        UsageLedger(tmp_path)


def test_a_full_disk_loses_the_line_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether nothing of it has room or a part."""
    path, write = tmp_path / "use.jsonl", os.write

    def no_room(file: int, data: bytes) -> int:
        raise OSError("no room")

    with closing(UsageLedger(path)) as ledger:
        ledger.append(entry(DAY))
        for full in (no_room, lambda file, data: write(file, data[:20])):
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", full)
                ledger.append(entry(DAY))
        ledger.append(entry(DAY))
        assert ledger.sums(1)["ann"].tokens == 30
    assert caplog.text.count("use.jsonl: a line was lost: no room") == 2


def test_each_day_has_a_file(tmp_path: Path) -> None:
    path = tmp_path / "use.jsonl"
    with closing(UsageLedger(path)) as ledger:
        ledger.append(entry(5 * DAY))
        ledger.append(entry(6 * DAY - 1))
        assert [one.name for one in tmp_path.glob("*.jsonl")] == ["use.jsonl"]
        ledger.append(entry(6 * DAY))
        ledger.append(entry(6 * DAY - 1))  # of a request that ran past midnight
        assert ledger.sums(6)["ann"].tokens == 15
        ledger.sync()
    assert (tmp_path / "use-1970-01-06.jsonl").read_bytes().count(b"\n") == 2
    with closing(UsageLedger(path)) as ledger:  # a restart on a later day
        assert ledger.sums(6)["ann"].tokens == 15
        ledger.append(entry(8 * DAY))
        assert ledger.sums(8)["ann"].tokens == 15
    assert (tmp_path / "use-1970-01-07.jsonl").read_bytes().count(b"\n") == 2
    assert path.read_bytes().count(b"\n") == 1


def test_no_file_of_a_day_is_overwritten(tmp_path: Path) -> None:
    """A clock may be set back."""
    path = tmp_path / "use.jsonl"
    for name in ("use-1970-01-06.jsonl", "use-1970-01-06.1.jsonl"):
        (tmp_path / name).write_text("kept")
    with closing(UsageLedger(path)) as ledger:
        ledger.append(entry(5 * DAY))
        ledger.append(entry(6 * DAY))
    assert (tmp_path / "use-1970-01-06.jsonl").read_text() == "kept"
    assert (tmp_path / "use-1970-01-06.1.jsonl").read_text() == "kept"
    assert (tmp_path / "use-1970-01-06.2.jsonl").read_bytes().count(b"\n") == 1


def test_where_no_new_file_can_be_begun_the_old_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("read-only")

    path = tmp_path / "use.jsonl"
    with closing(UsageLedger(path)) as ledger:
        ledger.append(entry(5 * DAY))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", refuse)
            ledger.append(entry(6 * DAY))
        assert "use.jsonl: a new file could not be begun: read-only" in caplog.text
        assert ledger.sums(6)["ann"].tokens == 15
        ledger.append(entry(6 * DAY))
        assert ledger.sums(6)["ann"].tokens == 15
    assert (tmp_path / "use-1970-01-06.jsonl").read_bytes().count(b"\n") == 2


def test_what_was_written_is_synced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with closing(UsageLedger(tmp_path / "use.jsonl")) as ledger:
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
        ledger.sync()
        assert synced == []
        ledger.append(entry(5 * DAY))
        ledger.append(entry(6 * DAY))
        ledger.sync()
        ledger.sync()
        files = [tmp_path / "use-1970-01-06.jsonl", tmp_path / "use.jsonl", tmp_path]
        assert synced == [file.stat().st_ino for file in files]
        ledger.append(entry(6 * DAY))
    assert len(synced) == 5  # closing it syncs


def test_a_disk_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(file: int) -> None:
        raise OSError("bad disk")

    with closing(UsageLedger(tmp_path / "use.jsonl")) as ledger:
        ledger.append(entry(DAY))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            ledger.sync()
            ledger.sync()
    assert caplog.text.count("not on the disk yet: bad disk") == 2


@given(data=st.data())
def test_cut_anywhere_only_the_last_line_is_lost(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "use.jsonl"
    names = data.draw(st.lists(st.sampled_from(["a", "b" * 64]), min_size=1, max_size=4))
    with closing(UsageLedger(path)) as ledger:
        for name in names:
            ledger.append(entry(DAY, name))
    whole = path.read_bytes()
    size = data.draw(st.integers(0, len(whole)))
    os.truncate(path, size)
    with closing(UsageLedger(path)) as ledger:
        use = ledger.sums(1)
        ledger.append(entry(DAY, "after"))
        assert ledger.sums(1)["after"].tokens == 15
    assert sum(one.tokens for one in use.values()) == 15 * whole[:size].count(b"\n")


WRITER = """
import sys
from pathlib import Path
from nybble.server.access.usage_ledger import LedgerEntry, UsageLedger
ledger = UsageLedger(Path(sys.argv[1]))
for number in range(10**9):
    counts = {"prompt_tokens": number, "cached_tokens": 0, "completion_tokens": 0}
    ledger.append(LedgerEntry(time=86400.0, key="ann", cost=0, **counts))
    print(number, flush=True)
"""


def test_killed_it_has_lost_nothing_that_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "use.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(200)]
        writer.kill()
        said += writer.stdout.readlines()
    last = int([line for line in said if line.endswith(b"\n")][-1])
    with closing(UsageLedger(path)) as ledger:
        numbers = [json.loads(line)["prompt_tokens"] for line in path.read_bytes().splitlines()]
        assert numbers == list(range(len(numbers))) and last < len(numbers) <= last + 2
        assert ledger.sums(1)["ann"].tokens == sum(numbers)
