"""The key file as it changes while the server runs."""

from __future__ import annotations

import logging
from pathlib import Path

from nybble.server.access.api_keys import APIKey, KeyFileError, parse_keys

logger = logging.getLogger("nybble.server")


class KeyFile:
    """Looked at now and then. Its content counts, not its times, which a clock or a copy may set anyhow."""

    def __init__(self, path: Path) -> None:
        """Raises KeyFileError: it names the file, and the field at fault."""
        self._path = path
        self._last = self._settled = _content(path)
        self.keys = self._parse()

    def look(self) -> list[APIKey] | None:
        """Its keys if they are other ones than before; blocks.

        A file that has just changed may be half written: it counts when it is the same at the next look. One
        that is broken or gone is logged, once, and changes nothing.
        """
        before, self._last = self._last, _content(self._path)
        if self._last != before or self._last == self._settled:
            return None
        self._settled = self._last
        try:
            self.keys = self._parse()
        except KeyFileError as error:
            logger.error("the API keys stay as they were: %s", error)
            return None
        logger.info("%d API keys in %s", len(self.keys), self._path)
        return self.keys

    def _parse(self) -> list[APIKey]:
        if isinstance(self._settled, str):
            raise KeyFileError(f"{self._path}: {self._settled}")
        return parse_keys(self._settled, self._path)


def _content(path: Path) -> bytes | str:
    """Its bytes, or why there are none."""
    try:
        return path.read_bytes()
    except OSError as error:
        return str(error)
