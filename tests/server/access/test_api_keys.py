from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nybble.server.access.api_keys import APIKey, KeyFileError, find_key, make_key, read_keys

HASH = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


def test_keys_are_made_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    secrets = {name: make_key(path, name, {}) for name in ("ann", "bob.2")}
    secrets["carl"] = make_key(path, "carl", {"requests_per_minute": 5, "cost_per_day": 0.5})
    keys = read_keys(path)
    for name, secret in secrets.items():
        found = find_key(keys, secret)
        assert found is not None and found.name == name
        assert find_key(keys, secret[:-1]) is None
        assert secret not in path.read_text()
        assert hashlib.sha256(secret.encode()).hexdigest() in path.read_text()
    assert (keys[2].requests_per_minute, keys[2].cost_per_day, keys[2].tokens_per_day) == (5, 0.5, None)
    assert len(set(secrets.values())) == 3
    assert find_key(keys, "") is None and find_key([], secrets["ann"]) is None


def test_a_key_file_is_for_its_owner_only(tmp_path: Path) -> None:
    make_key(tmp_path / "keys.toml", "ann", {})
    assert (tmp_path / "keys.toml").stat().st_mode & 0o777 == 0o600


def test_all_of_the_hash_is_compared() -> None:
    """Two keys whose hashes differ in the last digit only."""
    secret_hash = hashlib.sha256(b"secret").hexdigest()
    other = secret_hash[:-1] + ("0" if secret_hash[-1] != "0" else "1")
    keys = [APIKey(name="other", sha256=other), APIKey(name="ann", sha256=secret_hash)]
    found = find_key(keys, "secret")
    assert found is not None and found.name == "ann"
    assert find_key(keys[:1], "secret") is None


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("ann", {}),
        ("a b", {}),
        ("", {}),
        ('x"', {}),
        ("bob", {"tokens_per_day": 0}),
        ("bob", {"cost_per_day": -1}),
    ],
)
def test_a_bad_key_is_not_made(tmp_path: Path, name: str, limits: dict[str, float | None]) -> None:
    path = tmp_path / "keys.toml"
    make_key(path, "ann", {})
    before = path.read_bytes()
    with pytest.raises(KeyFileError):
        make_key(path, name, limits)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[keys]]", "name"),
        (f'[[keys]]\nname = "a"\nsha256 = "{HASH[1:]}"', "sha256"),
        (f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\nrequest_per_minute = 3', "request_per_minute"),
        (f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\ntokens_per_day = "many"', "tokens_per_day"),
        (f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\n' * 2, "same name"),
        ("[[keys", "at end of document"),
        ("key = []", "key"),
        ("\x00", "line 1"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(KeyFileError, match=named) as caught:
        read_keys(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"keys\.toml"):
        read_keys(tmp_path / "keys.toml")
