"""API keys: a TOML file that holds their hashes, names and limits.

    [[keys]]
    name = "ann"
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    requests_per_minute = 60

A key is 256 random bits, so that a plain hash of it cannot be searched for and needs no salt. To revoke one,
delete its entry or set `enabled = false`; a server that runs takes note within seconds (`key_file.py`).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from nybble.engine.errors import NybbleError

_PREFIX = "nybble-"

Limit = Annotated[int, Meta(ge=1)]


class KeyFileError(NybbleError):
    """A key file that cannot be read, written or understood."""


class APIKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key as its file has it. A limit that is None does not exist.

    tokens_per_day counts prompts and answers, cost_per_day US dollars by the server's prices; days are UTC's.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    enabled: bool = True
    requests_per_minute: Limit | None = None
    concurrent_requests: Limit | None = None
    tokens_per_day: Limit | None = None
    cost_per_day: Annotated[float, Meta(gt=0)] | None = None


class _KeyFile(Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[APIKey] = []


def read_keys(path: Path) -> list[APIKey]:
    """Raises KeyFileError: it names the file, and the field at fault."""
    try:
        return parse_keys(path.read_bytes(), path)
    except OSError as error:
        raise KeyFileError(f"{path}: {error}") from error


def parse_keys(content: bytes, path: Path) -> list[APIKey]:
    """The keys in what a file of that name holds. Raises KeyFileError as `read_keys` does."""
    try:
        keys = msgspec.toml.decode(content, type=_KeyFile).keys
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise KeyFileError(f"{path}: {error}") from error
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        if len(set(values)) < len(values):
            raise KeyFileError(f"{path}: two keys have the same {field}")
    return keys


def make_key(path: Path, name: str, limits: Mapping[str, float | None]) -> str:
    """A new key of that name, added to a file; what is returned is stored nowhere.

    limits: fields of `APIKey`.

    Raises:
        KeyFileError: the name is taken, a limit is out of range, or the file is bad.
    """
    secret = _PREFIX + secrets.token_urlsafe(32)
    try:
        entry = msgspec.convert({"name": name, "sha256": digest(secret), **limits}, APIKey)
    except msgspec.ValidationError as error:
        raise KeyFileError(f"key {name!r}: {error}") from error
    add_key(path, entry)
    return secret


def add_key(path: Path, entry: APIKey) -> None:
    """Append to a file that only its owner may read, made if missing. Raises KeyFileError."""
    known = read_keys(path) if path.exists() else []
    if any(key.name == entry.name for key in known):
        raise KeyFileError(f"{path}: there is a key named {entry.name!r} already")
    fields = {name: value for name, value in msgspec.structs.asdict(entry).items() if value is not None}
    lines = [f"{name} = {msgspec.json.encode(value).decode()}\n" for name, value in fields.items()]
    try:
        with open(path, "a", opener=_private) as file:
            file.write("".join(["\n[[keys]]\n", *lines]))
    except OSError as error:
        raise KeyFileError(f"{path}: {error}") from error


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def find_key(keys: Sequence[APIKey], secret: str) -> APIKey | None:
    """The key that is `secret`, in a time that does not depend on how far it agrees with one."""
    presented = digest(secret)
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, presented):
            found = key
    return found


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
