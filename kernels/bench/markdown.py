"""The results of the kernel benchmark as text: a line for the terminal, a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nybble.kernels.bench.report import MODELLED, OURS, BenchReport, Omission, Row

_HEADINGS = ("case", "backend", "median", "p10 - p90", "GB/s", "TFLOP/s", "of roof", "launches", "RMS error")


def summary(report: BenchReport) -> str:
    """A page: machine, method, a table for each op, what is missing."""
    is_modelled = any(row.kind == MODELLED for row in report.rows)
    lines = [
        "# Kernel benchmark of GLM-4.7" + (" (modelled, nothing was measured)" if is_modelled else ""),
        "",
        *(
            f"* {name}: {value}"
            for name, value in {**report.machine, **report.method, **report.roofs}.items()
        ),
        "",
    ]
    for op in dict.fromkeys(row.case.op for row in report.rows):
        lines += [f"## {op}", "", *_table(row for row in report.rows if row.case.op == op), ""]
    if spilling := [row.case.name for row in report.rows if any(k.stack_bytes for k in row.kernels)]:
        lines += ["## Kernels that spill registers", "", *(f"* {name}" for name in spilling), ""]
    if report.omissions:
        lines += ["## Not in the tables", "", *_omission_lines(report.omissions), ""]
    return "\n".join(lines)


def progress_line(row: Row) -> str:
    """Of a row, for someone who waits."""
    spread = "modelled" if row.kind == MODELLED else f"{row.p10_us:.1f} - {row.p90_us:.1f}"
    per_item = [f"{k.instructions_per_item:.2f}" for k in row.kernels if k.instructions_per_item is not None]
    counts = f"  instructions/item {' '.join(per_item)}" if per_item else ""
    return (
        f"{row.median_us:10.1f} us ({spread})  {row.roof_fraction:6.1%} of roof  {len(row.kernels)} "
        "launches  "
        f"{row.case.name}{'' if row.backend == OURS else f'  [{row.backend}]'}{counts}"
    )


def omission_line(omission: Omission) -> str:
    word = "FAULT" if omission.is_fault else "skipped"
    return f"{word}: {omission.name} [{omission.backend}]: {omission.reason}"


def _table(rows: Iterable[Row]) -> Iterator[str]:
    yield "| " + " | ".join(_HEADINGS) + " |"
    yield "| --- | --- |" + " ---: |" * (len(_HEADINGS) - 2)
    for row in rows:
        yield "| " + " | ".join(_cells(row)) + " |"


def _cells(row: Row) -> tuple[str, ...]:
    is_modelled = row.kind == MODELLED
    return (
        row.case.name,
        row.backend,
        f"{row.median_us:.1f} us" + (" modelled" if is_modelled else ""),
        row.start if is_modelled else f"{row.p10_us:.1f} - {row.p90_us:.1f}",
        f"{row.gb_per_s:,.0f}",
        f"{row.tflop_per_s:,.1f}" if row.flops else "-",
        f"{row.roof_fraction:.1%}",
        str(len(row.kernels)) if row.backend == OURS else "-",
        "-" if row.rms_error is None else f"{row.rms_error:.1e}",
    )


def _omission_lines(omissions: Iterable[Omission]) -> Iterator[str]:
    """Cases that are left out for the same reason stand together."""
    reasons: dict[tuple[bool, str, str], list[str]] = {}
    for omission in omissions:
        key = (not omission.is_fault, omission.backend, omission.reason)
        reasons.setdefault(key, []).append(omission.name)
    for (is_skipped, backend, reason), names in sorted(reasons.items()):
        word = "skipped" if is_skipped else "**fault**"
        some = "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
        yield f"* {word}, {backend}: {reason} ({some})"
