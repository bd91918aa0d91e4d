"""Make an FP4 checkpoint from a BF16 one, shard by shard.

A shard of the result has the name of the source's and holds the same modules. It is written to a hidden
sibling of the destination as soon as it is done; a run that is interrupted goes on from the last whole
shard, and the directory gets its name when all are there. Memory is bounded by the shard being written
plus `WORKSPACE_BYTES`. The same source and recipe give the same bytes, however often interrupted.

Norms, biases, router, embedding and head stay as they are, and so does the draft (MTP) layer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nybble.engine.checkpoint.checkpoint import INDEX_FILE, Checkpoint, TensorEntry, read_header
from nybble.engine.checkpoint.checkpoint_writer import lock_for_writing, partial_of, publish, write_json
from nybble.engine.checkpoint.layouts import (
    COMPRESSED_MXFP4,
    FLOATS,
    FP8_PER_CHANNEL,
    Layout,
    check_columns,
    find_layout,
    stored_tensors,
)
from nybble.engine.checkpoint.model_config import ModelConfig, read_json_object
from nybble.engine.checkpoint.parameters import check_tensors, expected_parameters
from nybble.engine.checkpoint.quantize_recipe import QuantizeRecipe, tensor_class
from nybble.engine.errors import CheckpointError
from nybble.kernels import fp8, mxfp4, nvfp4
from nybble.kernels.quantized_tensor import QuantizedTensor

# Beside the shard being written: the interpreter and torch (about 0.4 GiB) and float32 copies of the one
# matrix at work (GLM-4.7's largest that is quantized has 63 million entries: 0.25 GB each, up to six).
WORKSPACE_BYTES = 2 << 30

_MEASURED_ROWS = 256
_RECIPE_FILE = "nybble-quantize.json"
_REPORT_SUFFIX = ".report.json"


@dataclass(frozen=True)
class TensorError:
    """What quantizing a matrix cost: sums of squares of its weights and of their errors."""

    name: str
    tensor_class: str
    squares: float
    squared_errors: float

    @property
    def relative(self) -> float:
        """Root mean square of the errors over that of the weights."""
        return (self.squared_errors / self.squares) ** 0.5 if self.squares else 0.0


def quantize_checkpoint(
    source: Path,
    destination: Path,
    recipe: QuantizeRecipe,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[TensorError]:
    """Write `source` to `destination` by `recipe`; `on_bytes` is told of source bytes as they are done.

    Raises:
        CheckpointError: the source is incomplete or quantized already, the destination exists, cannot be
            written, or holds an unfinished run of another source or recipe.
    """
    return _Run(source, destination, recipe, on_bytes).run()


class _Run:
    def __init__(
        self, source: Path, destination: Path, recipe: QuantizeRecipe, on_bytes: Callable[[int], None]
    ) -> None:
        self._config = ModelConfig.from_directory(source)
        self._checkpoint = Checkpoint.open(source)
        self._destination = destination
        self._partial = partial_of(destination)
        self._recipe = recipe
        self._on_bytes = on_bytes
        self._targets = self._choose_targets()
        self._shared_scales: dict[str, Tensor] = {}

    def run(self) -> list[TensorError]:
        lock = lock_for_writing(self._destination)
        errors: list[TensorError] = []
        try:
            self._prepare_partial()
            for shard in sorted({entry.file.name for entry in self._checkpoint.entries.values()}):
                errors += self._shard(shard)
            self._finish()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._destination}: cannot be written: {error}") from error
        finally:
            os.close(lock)
        return errors

    def _choose_targets(self) -> dict[str, Layout]:
        """Layout of each module that is to be quantized."""
        entries = self._checkpoint.entries
        check_tensors(self._config, entries)
        targets = {}
        for parameter in expected_parameters(self._config):
            if not parameter.is_linear or tensor_class(parameter.module) is None:
                continue
            if find_layout(parameter.module, entries) is not FLOATS:
                raise CheckpointError(f"{entries[parameter.name]}: is quantized already")
            layout = self._recipe.target(parameter.module)
            check_columns(entries[parameter.name], parameter.shape[1], layout)
            if layout is not FLOATS:
                targets[parameter.module] = layout
        return targets

    def _prepare_partial(self) -> None:
        """Start, or go on with what an interrupted run of the same source and recipe left."""
        files = {entry.file for entry in self._checkpoint.entries.values()}
        fingerprint = {
            "recipe": asdict(self._recipe),
            "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)},
        }
        marker = self._partial / _RECIPE_FILE
        if marker.exists() and read_json_object(marker) != json.loads(json.dumps(fingerprint)):
            raise CheckpointError(
                f"{self._partial}: holds an unfinished run of another source or recipe; remove it to "
                "start anew"
            )
        self._partial.mkdir(exist_ok=True)
        marker.write_text(json.dumps(fingerprint))

    def _shard(self, shard: str) -> list[TensorError]:
        """Write one shard, unless it is there; returns the errors of its matrices."""
        entries = [entry for entry in self._checkpoint.entries.values() if entry.file.name == shard]
        target, report = self._partial / shard, self._partial / (shard + _REPORT_SUFFIX)
        if not target.exists():
            tensors: dict[str, Tensor] = {}
            errors = [error for entry in entries for error in self._convert(entry, tensors)]
            report.write_text(json.dumps([asdict(error) for error in errors]))
            unfinished = target.with_suffix(".unfinished")
            save_file(tensors, unfinished, {"format": "pt"})
            unfinished.rename(target)
            self._checkpoint.close()  # its pages would count as ours
        else:
            self._on_bytes(sum(entry.num_bytes for entry in entries))
        return [TensorError(**fields) for fields in json.loads(report.read_text())]

    def _convert(self, entry: TensorEntry, tensors: dict[str, Tensor]) -> Iterator[TensorError]:
        """Add what becomes of one tensor to `tensors`; yields its error if it is quantized."""
        module = entry.name.removesuffix(".weight")
        layout = self._targets.get(module) if entry.name.endswith(".weight") else None
        weight = self._checkpoint.read(entry.name)
        if layout is None:
            tensors[entry.name] = weight.clone()
        else:
            quantized = self._quantize(module, weight, layout)
            tensors.update(stored_tensors(module, quantized, layout))
            yield _measure(module, weight, quantized)
        self._on_bytes(entry.num_bytes)

    def _quantize(self, module: str, weight: Tensor, layout: Layout) -> QuantizedTensor:
        if layout is FP8_PER_CHANNEL:
            return fp8.quantize(weight)
        if layout is COMPRESSED_MXFP4:
            return mxfp4.quantize(weight)
        return nvfp4.quantize(weight, self._shared_scale(module))

    def _shared_scale(self, module: str) -> Tensor:
        """Global scale of the matrices that engines fuse: gate with up; q, k and v. They may lie in
        different shards."""
        prefix, _, projection = module.rpartition(".")
        group = next(
            (g for g in (("gate", "up"), ("q", "k", "v")) if projection[:-5] in g), (projection[:-5],)
        )
        key = f"{prefix}.{group[0]}"
        if key not in self._shared_scales:
            weights = [self._checkpoint.read(f"{prefix}.{name}_proj.weight") for name in group]
            self._shared_scales[key] = nvfp4.global_scale(*weights)
        return self._shared_scales[key]

    def _finish(self) -> None:
        """Index, config and the files that are no weights; then the directory gets its name."""
        source, partial = self._checkpoint.directory, self._partial
        shards = sorted(partial.glob("*.safetensors"))
        headers = {shard.name: read_header(shard) for shard in shards}
        weight_map = {name: file for file, entries in headers.items() for name in entries}
        total = sum(entry.num_bytes for entries in headers.values() for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(partial / INDEX_FILE, index)
        config = read_json_object(source / "config.json") | {
            "quantization_config": self._recipe.declaration(self._config, self._targets)
        }
        write_json(partial / "config.json", config)
        for path in source.iterdir():
            is_ours = path.name in (INDEX_FILE, "config.json") or path.suffix == ".safetensors"
            if path.is_file() and not is_ours:
                shutil.copyfile(path, partial / path.name)
        for path in (*partial.glob(f"*{_REPORT_SUFFIX}"), partial / _RECIPE_FILE):
            path.unlink()
        publish(partial, self._destination)


def _measure(module: str, weight: Tensor, quantized: QuantizedTensor) -> TensorError:
    squares = squared_errors = 0.0
    # In float64, but only a few rows of it at a time.
    rows = zip(
        torch.split(weight, _MEASURED_ROWS), torch.split(quantized.dequantize(), _MEASURED_ROWS), strict=True
    )
    for exact, approximate in ((a.double(), b) for a, b in rows):
        squares += exact.square().sum().item()
        squared_errors += (exact - approximate).square().sum().item()
    return TensorError(module, tensor_class(module) or "", squares, squared_errors)
