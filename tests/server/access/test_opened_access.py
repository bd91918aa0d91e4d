from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nybble.server.access import opened_access as module
from nybble.server.access.access import Access
from nybble.server.access.api_keys import KeyFileError, make_key
from nybble.server.access.opened_access import opened_access
from nybble.server.access.usage_ledger import LedgerError, UsageLedger
from nybble.server.errors import UnauthorizedError
from nybble.server.server_config import ServerConfig


def run(config: ServerConfig) -> Access | None:
    async def scenario() -> Access | None:
        async with opened_access(config) as access:
            return access

    return asyncio.run(scenario())


def test_without_a_key_file_anybody_may_come() -> None:
    assert run(ServerConfig()) is None
    with pytest.raises(KeyFileError, match="usage_ledger"):
        run(ServerConfig(usage_ledger="x"))


def test_the_ledger_is_beside_the_key_file_and_closed_at_the_end(tmp_path: Path) -> None:
    make_key(tmp_path / "keys.toml", "ann", {})
    for name, config in (
        ("keys.toml.usage.jsonl", ServerConfig(api_key_file=str(tmp_path / "keys.toml"))),
        (
            "other.jsonl",
            ServerConfig(
                api_key_file=str(tmp_path / "keys.toml"), usage_ledger=str(tmp_path / "other.jsonl")
            ),
        ),
    ):
        assert run(config) is not None
        UsageLedger(tmp_path / name).close()
    with pytest.raises(LedgerError):
        run(ServerConfig(api_key_file=str(tmp_path / "keys.toml"), usage_ledger=str(tmp_path)))


def test_keys_are_taken_over_and_the_ledger_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEY_FILE_SECONDS", 0.01)
    monkeypatch.setattr(module, "_LEDGER_SYNC_SECONDS", 0.01)
    synced = asyncio.Event()

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(UsageLedger, "sync", lambda self: loop.call_soon_threadsafe(synced.set))
        path = tmp_path / "keys.toml"
        first = make_key(path, "ann", {})
        async with opened_access(ServerConfig(api_key_file=str(path))) as access:
            assert access is not None
            path.unlink()
            second = make_key(path, "bob", {})
            while True:
                try:
                    assert access.enter([f"Bearer {second}"]).name == "bob"
                    break
                except UnauthorizedError:
                    await asyncio.sleep(0.01)
            with pytest.raises(UnauthorizedError):
                access.enter([f"Bearer {first}"])
            await synced.wait()

    asyncio.run(asyncio.wait_for(scenario(), 30))
