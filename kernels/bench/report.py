"""What a run of the kernel benchmark found, and its form as JSON.

The version goes up when a reader of older files would go wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nybble.kernels.bench.cases import BenchCase

SCHEMA = "nybble-bench-ops/1"
OURS = "nybble"
MEASURED, MODELLED = "measured", "modelled"


class BenchFileError(Exception):
    """A file is not a result of this benchmark."""


@dataclass(frozen=True)
class KernelInfo:
    """Of one launch. instructions_per_item: of the hot loop, for a weight or a KV element; None where nothing
    counts its items."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    instructions_per_item: float | None = None


@dataclass(frozen=True)
class Row:
    """A case on one backend.

    kind: MEASURED or MODELLED; a modelled time has no spread: p10 and p90 are its median
    roof_us: the least time that bandwidth and arithmetic allow
    start: how runs were started; of a modelled time, what bounds it
    max_error, rms_error: as `judge` has them; None where nothing ran
    """

    case: BenchCase
    backend: str
    kind: str
    median_us: float
    p10_us: float
    p90_us: float
    num_bytes: int
    flops: int
    roof_us: float
    start: str
    max_error: float | None
    rms_error: float | None
    kernels: tuple[KernelInfo, ...]
    repro: str

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / self.median_us / 1e3

    @property
    def tflop_per_s(self) -> float:
        return self.flops / self.median_us / 1e6

    @property
    def roof_fraction(self) -> float:
        return self.roof_us / self.median_us

    def to_fields(self) -> dict[str, Any]:
        derived = {
            "name": self.case.name,
            "launches": len(self.kernels),
            "gb_per_s": round(self.gb_per_s, 1),
            "tflop_per_s": round(self.tflop_per_s, 2),
            "roof_fraction": round(self.roof_fraction, 4),
        }
        return asdict(self) | derived


@dataclass(frozen=True)
class Omission:
    """A case that has no row on a backend. is_fault: it ran and was wrong, or could not run though it
    should."""

    name: str
    backend: str
    reason: str
    is_fault: bool = False


@dataclass(frozen=True)
class BenchReport:
    """machine: the device and its software; method: how times came about; roofs: GB/s and TFLOP/s."""

    machine: Mapping[str, Any]
    method: Mapping[str, Any]
    roofs: Mapping[str, float]
    rows: tuple[Row, ...]
    omissions: tuple[Omission, ...]

    @property
    def faults(self) -> list[Omission]:
        return [omission for omission in self.omissions if omission.is_fault]

    def to_json(self) -> str:
        document = {
            "schema": SCHEMA,
            "machine": dict(self.machine),
            "method": dict(self.method),
            "roofs": dict(self.roofs),
            "rows": [row.to_fields() for row in self.rows],
            "omissions": [asdict(omission) for omission in self.omissions],
        }
        return json.dumps(document, indent=1) + "\n"


def read_report(path: Path) -> BenchReport:
    """Raises BenchFileError, also where the file cannot be read."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchFileError(f"{path}: {error}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise BenchFileError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}")
    return BenchReport(
        document["machine"],
        document["method"],
        document["roofs"],
        tuple(_row(entry) for entry in document["rows"]),
        tuple(Omission(**entry) for entry in document["omissions"]),
    )


def _row(entry: dict[str, Any]) -> Row:
    known = {name: entry[name] for name in (field.name for field in fields(Row))}
    kernels = tuple(KernelInfo(**kernel) for kernel in entry["kernels"])
    return Row(**known | {"case": BenchCase(**entry["case"]), "kernels": kernels})
