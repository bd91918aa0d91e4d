"""The key file and the usage ledger of a running server: opened, watched, put on the disk, closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from pathlib import Path

from nybble.server.access.access import Access
from nybble.server.access.api_keys import KeyFileError
from nybble.server.access.key_file import KeyFile
from nybble.server.access.usage_ledger import UsageLedger
from nybble.server.server_config import ServerConfig

logger = logging.getLogger("nybble.server")

_KEY_FILE_SECONDS = 1.0  # from one look at the key file to the next
_LEDGER_SYNC_SECONDS = 5.0


@asynccontextmanager
async def opened_access(config: ServerConfig) -> AsyncGenerator[Access | None, None]:
    """Raises NybbleError: the key file or the ledger is bad, or there is a ledger and no keys."""
    if config.api_key_file is None:
        if config.usage_ledger is not None:
            raise KeyFileError("usage_ledger is given without api_key_file")
        yield None
        return
    file = KeyFile(Path(config.api_key_file))
    ledger_path = Path(config.usage_ledger or f"{config.api_key_file}.usage.jsonl")
    with closing(UsageLedger(ledger_path)) as ledger:
        logger.info("%d API keys in %s", len(file.keys), config.api_key_file)
        access = Access(file.keys, ledger, config.prices, max_failed_attempts=config.max_failed_attempts)
        tasks = [asyncio.create_task(_watch_keys(file, access)), asyncio.create_task(_sync_ledger(ledger))]
        try:
            yield access
        finally:
            for task in tasks:
                task.cancel()


async def _watch_keys(file: KeyFile, access: Access) -> None:
    while True:
        await asyncio.sleep(_KEY_FILE_SECONDS)
        keys = await asyncio.to_thread(file.look)
        if keys is not None:
            access.replace_keys(keys)


async def _sync_ledger(ledger: UsageLedger) -> None:
    while True:
        await asyncio.sleep(_LEDGER_SYNC_SECONDS)
        await asyncio.to_thread(ledger.sync)
