"""`nybble quantize`: progress while it runs, a report of what it cost at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.quantize_checkpoint import TensorError, quantize_checkpoint
from nybble.engine.checkpoint.quantize_recipe import QuantizeRecipe

_NUM_WORST = 10


def quantize(source: Path, destination: Path, recipe: QuantizeRecipe, console: Console) -> None:
    """Quantize and print the report. Raises CheckpointError as `quantize_checkpoint`."""
    total = sum(entry.num_bytes for entry in Checkpoint.open(source).entries.values())
    columns = (TextColumn("quantizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("quantizing", total=total)
        errors = quantize_checkpoint(
            source, destination, recipe, on_bytes=lambda count: progress.advance(task, count)
        )
    console.print(_class_table(errors))
    console.print(_worst_table(errors))


def _class_table(errors: Sequence[TensorError]) -> Table:
    by_class: dict[str, list[TensorError]] = defaultdict(list)
    for error in errors:
        by_class[error.tensor_class].append(error)
    table = Table(
        "class", "matrices", "relative error", title="Error by class (RMS of error / RMS of weights)"
    )
    for name, members in sorted(by_class.items()):
        squares = sum(member.squares for member in members)
        squared_errors = sum(member.squared_errors for member in members)
        overall = TensorError(name, name, squares, squared_errors)
        table.add_row(name, str(len(members)), f"{overall.relative:.4%}")
    return table


def _worst_table(errors: Sequence[TensorError]) -> Table:
    table = Table("matrix", "relative error", title="Worst matrices")
    for error in sorted(errors, key=lambda error: (-error.relative, error.name))[:_NUM_WORST]:
        table.add_row(error.name, f"{error.relative:.4%}")
    return table
