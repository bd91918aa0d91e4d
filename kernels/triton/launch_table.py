"""Launch configurations that were measured on a user's machine, in place of those that the code would choose.

`nybble bench ops --tune` writes such a table as JSON:

    {"schema": "nybble-launches/1", "device": "NVIDIA H100 80GB HBM3", "triton": "3.6.0", "launches": [
        {"op": "expert_down", "arch": 90, "format": "nvfp4", "shape": {"rows": 5120, "tokens": 8, "width":
        192},
         "fields": {"block_rows": 32, "num_stages": 3}}]}

`fields` replaces fields of the launch dataclass that the pure function of the op returns. Counts of tokens
and the like are rounded up to a power of two, in the table and when it is asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

SCHEMA = "nybble-launches/1"
_ENTRY_KEYS = {"op", "arch", "format", "shape", "fields"}

L = TypeVar("L")


class LaunchTableError(Exception):
    """A launch table that cannot be used: no file, another schema, an op or a field that there is not."""


@dataclass(frozen=True)
class LaunchKey:
    """shape: the numbers that the launch depends on, by name and sorted."""

    op: str
    arch: int
    format: str
    shape: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, op: str, arch: int, format: str, shape: Mapping[str, int]) -> LaunchKey:
        return cls(op, arch, format, tuple(sorted(shape.items())))


@dataclass(frozen=True)
class LaunchTable:
    """An empty one changes nothing."""

    launches: Mapping[LaunchKey, Mapping[str, int | bool]] = field(default_factory=dict)
    device: str = ""
    triton: str = ""

    def tuned(self, op: str, arch: int, format: str, shape: Mapping[str, int], default: L) -> L:
        """`default`, a launch dataclass, with what the table says of this op at this shape."""
        overrides = self.launches.get(LaunchKey.of(op, arch, format, shape), {})
        return replace(default, **overrides) if overrides else default  # type: ignore[type-var]

    def to_json(self) -> str:
        launches = [
            {
                **{"op": key.op, "arch": key.arch, "format": key.format},
                **{"shape": dict(key.shape), "fields": dict(overrides)},
            }
            for key, overrides in self.launches.items()
        ]
        document = {"schema": SCHEMA, "device": self.device, "triton": self.triton, "launches": launches}
        return json.dumps(document, indent=1) + "\n"


def load_launch_table(path: Path, ops: Mapping[str, type]) -> LaunchTable:
    """`ops`: the launch dataclass of each op that can be tuned. Raises LaunchTableError."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LaunchTableError(f"{path}: {error}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise LaunchTableError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}")
    launches: dict[LaunchKey, Mapping[str, int | bool]] = {}
    for number, entry in enumerate(document.get("launches", [])):
        try:
            launches |= _parse(entry, ops)
        except LaunchTableError as error:
            raise LaunchTableError(f"{path}: launch {number}: {error}") from None
    return LaunchTable(launches, document.get("device", ""), document.get("triton", ""))


def default_launch_table() -> Path:
    """Where --tune writes if it is not told: in the user's configuration directory."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "nybble" / "launches.json"


def bucket(count: int) -> int:
    """The power of two that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()


def _parse(entry: Any, ops: Mapping[str, type]) -> dict[LaunchKey, Mapping[str, int | bool]]:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise LaunchTableError(f"expected {', '.join(sorted(_ENTRY_KEYS))}, found {entry!r}")
    if entry["op"] not in ops:
        raise LaunchTableError(f"op {entry['op']!r} is not known; known are {', '.join(sorted(ops))}")
    for name in ("shape", "fields"):
        _check_integers(name, entry[name])
    known = {field.name for field in fields(ops[entry["op"]])}
    if unknown := entry["fields"].keys() - known:
        raise LaunchTableError(
            f"{entry['op']} has no {', '.join(sorted(unknown))}; its fields are {', '.join(sorted(known))}"
        )
    key = LaunchKey.of(entry["op"], entry["arch"], entry["format"], entry["shape"])
    return {key: entry["fields"]}


def _check_integers(name: str, numbers: Any) -> None:
    if not isinstance(numbers, dict) or not all(isinstance(number, int) for number in numbers.values()):
        raise LaunchTableError(f"{name} is {numbers!r}, expected names with whole numbers")
