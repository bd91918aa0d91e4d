"""SHA-256 of every file of a checkpoint, written once and checked ever after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from nybble.engine.checkpoint.model_config import read_json_object
from nybble.engine.errors import CheckpointError

MANIFEST_FILE = "nybble-manifest.json"
_PIECE_BYTES = 16 << 20

OnBytes = Callable[[int], None]


def write_manifest(directory: Path, manifest: Path, on_bytes: OnBytes) -> None:
    """Record the files of `directory`. Raises CheckpointError if `manifest` cannot be written."""
    hashes = {path.name: _sha256(path, on_bytes) for path in checked_files(directory)}
    try:
        manifest.write_text(json.dumps({"sha256": hashes}, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{manifest}: cannot be written: {error.strerror}") from error


def check_manifest(directory: Path, manifest: Path, on_bytes: OnBytes) -> Iterator[str]:
    """Yields what differs from the manifest, a line each. Raises CheckpointError if it is unreadable."""
    recorded = read_json_object(manifest).get("sha256")
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{manifest}: has no 'sha256' object")
    files = {path.name: path for path in checked_files(directory)}
    for name in sorted(recorded.keys() | files.keys()):
        if name not in files:
            yield f"{name}: is in the manifest but not in the directory"
        elif name not in recorded:
            yield f"{name}: is in the directory but not in the manifest"
        elif (digest := _sha256(files[name], on_bytes)) != recorded[name]:
            yield f"{name}: SHA-256 is {digest}, the manifest has {recorded[name]}"


def checked_files(directory: Path) -> list[Path]:
    """The files of a checkpoint directory, in order of name, without the manifest itself."""
    return sorted(p for p in directory.iterdir() if p.is_file() and p.name != MANIFEST_FILE)


def _sha256(path: Path, on_bytes: OnBytes) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
                on_bytes(len(piece))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()
