"""Writes a checkpoint directory that appears complete or not at all.

Everything goes to a hidden sibling directory first, which is renamed to its final name at the end. An
interrupted run leaves only that sibling, and the next run for the same directory removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nybble.engine.checkpoint.checkpoint import INDEX_FILE
from nybble.engine.checkpoint.layouts import Layout, stored_tensors
from nybble.engine.errors import CheckpointError
from nybble.kernels.quantized_tensor import QuantizedTensor

SHARD_BYTES = 64 << 20


class CheckpointWriter:
    """Context manager. Tensors are flushed to a shard whenever `shard_bytes` have come together.

    `metadata` goes into the index file.

    Raises:
        CheckpointError: `directory` exists already, or cannot be written.
    """

    def __init__(
        self, directory: Path, metadata: dict[str, Any] | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._directory = directory
        self._partial = partial_of(directory)
        self._metadata = metadata or {}
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._total_bytes = 0
        self._lock = -1  # descriptor, while writing

    def __enter__(self) -> CheckpointWriter:
        self._lock = lock_for_writing(self._directory)
        try:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir()
        except OSError as error:
            os.close(self._lock)
            raise CheckpointError(f"{self._directory}: cannot be written: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._publish()
        except OSError as error:
            raise CheckpointError(f"{self._directory}: cannot be written: {error}") from error
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)  # gone if it was published
            os.close(self._lock)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, as it is now. Raises CheckpointError if the disk is full."""
        if name in self._names:
            raise ValueError(f"tensor {name!r} is added twice")
        self._names.add(name)
        self._pending[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._total_bytes += tensor.nbytes
        if sum(t.nbytes for t in self._pending.values()) >= self._shard_bytes:
            self._flush()

    def add_matrix(self, name: str, weight: QuantizedTensor, layout: Layout) -> None:
        """Add a quantized weight as module `name`, in a layout of its format."""
        for tensor_name, tensor in stored_tensors(name, weight, layout).items():
            self.add(tensor_name, tensor)

    def write_json(self, name: str, content: Any) -> None:
        write_json(self._partial / name, content)

    def write_text(self, name: str, content: str) -> None:
        (self._partial / name).write_text(content, encoding="utf-8")

    def _flush(self) -> None:
        # The number of shards is part of their names and not known yet.
        try:
            save_file(self._pending, self._partial / f"{len(self._shards)}.shard", {"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._directory}: cannot be written: {error}") from error
        self._shards.append(list(self._pending))
        self._pending = {}

    def _publish(self) -> None:
        if self._pending:
            self._flush()
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05}-of-{len(self._shards):05}.safetensors"
            (self._partial / f"{number}.shard").rename(self._partial / file)
            weight_map.update(dict.fromkeys(names, file))
        metadata = {"total_size": self._total_bytes} | self._metadata
        self.write_json(INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})
        publish(self._partial, self._directory)


def partial_of(directory: Path) -> Path:
    """The hidden sibling in which `directory` is prepared."""
    return directory.with_name(f".{directory.name}.partial")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def lock_for_writing(directory: Path) -> int:
    """A descriptor that keeps other processes from writing `directory` until it is closed.

    Raises:
        CheckpointError: `directory` exists, cannot be written, or is being written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory.parent, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise CheckpointError(f"{directory.parent}: another process is writing a checkpoint there") from None
    if directory.exists() or directory.is_symlink():
        os.close(lock)
        raise CheckpointError(f"{directory}: exists already")
    return lock


def publish(partial: Path, directory: Path) -> None:
    """Give a finished directory its name, once all of it is on the disk."""
    mask = os.umask(0)
    os.umask(mask)
    for path in partial.iterdir():
        path.chmod(0o666 & ~mask)  # the safetensors library lets only the owner read
        _sync(path)
    _sync(partial)
    partial.rename(directory)
    _sync(directory.parent)


def _sync(path: Path) -> None:
    """Flush to disk, so that a power cut after the rename cannot leave an empty file behind it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
