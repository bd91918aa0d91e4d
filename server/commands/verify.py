"""`nybble verify`: hashes, completeness, numbers, self-test, each with one line of result."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from nybble.engine.checkpoint.manifest import MANIFEST_FILE, check_manifest, checked_files, write_manifest
from nybble.engine.checkpoint.parameters import expected_parameters
from nybble.engine.checkpoint.verify_checkpoint import check_structure, find_bad_numbers, self_test
from nybble.engine.errors import CheckpointError

_SHOWN = 20


def verify(directory: Path, manifest: Path | None, console: Console) -> None:
    """Check a checkpoint directory, printing what was checked.

    Raises:
        CheckpointError: something is wrong; all that is wrong with hashes or numbers was printed.
    """
    config, checkpoint = check_structure(directory)
    console.print(f"structure: {len(checkpoint.entries)} tensors, complete")
    _verify_hashes(directory, manifest or directory / MANIFEST_FILE, console)
    num_parameters = sum(1 for _ in expected_parameters(config))
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("numbers", total=num_parameters)
        problems = list(find_bad_numbers(config, checkpoint, lambda: progress.advance(task)))
    _refuse(problems, "numbers", console)
    console.print(f"numbers: {num_parameters} parameters, no NaN, infinity or zero scale")
    error = self_test(config, checkpoint)
    console.print(f"self-test: bfloat16 differs from float32 by {error:.2%}")


def _verify_hashes(directory: Path, manifest: Path, console: Console) -> None:
    total = sum(path.stat().st_size for path in checked_files(directory))
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("hashes", total=total)

        def on_bytes(count: int) -> None:
            progress.advance(task, count)

        if not manifest.exists():
            write_manifest(directory, manifest, on_bytes)
            console.print(f"hashes: no manifest yet, written to {manifest}")
            return
        problems = list(check_manifest(directory, manifest, on_bytes))
    _refuse(problems, "hashes", console)
    console.print(f"hashes: all files are those of {manifest}")


def _refuse(problems: list[str], what: str, console: Console) -> None:
    for problem in problems[:_SHOWN]:
        console.print(problem, highlight=False, markup=False)
    if problems:
        raise CheckpointError(f"{what}: {len(problems)} problems, the first: {problems[0]}")
