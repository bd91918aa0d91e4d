"""How fast a checkpoint loads, against a plain sequential read of the same files, on this machine.

    .venv/bin/python benchmarks/loading_speed.py [build/synthetic-checkpoint] [--repeat 7]

Weights are loaded as stored: what a backend makes of them afterwards is not counted. Cold: the files have
been dropped from the page cache. Each measurement is a new process, reads and loads alternate; median (min
.. max) of the repeats. Right before the time is taken, as much memory as is needed is written to and freed:
the host of a virtual machine takes back what is free for long, and gives it slowly. Before any of that,
loaded tensors must equal what the safetensors library reads; else there is no figure. Prints a Markdown
table.
"""

from __future__ import annotations

import os

from nybble.engine.ranks.tuning import TUNING

os.environ.update(TUNING | os.environ)  # before torch is imported

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.verify_checkpoint import check_structure
from nybble.engine.machine import processor_name
from nybble.engine.model.weights import Stored, load_weights

COLD = ("sequential read, cold", "load, cold")
WARM = ("sequential read, warm", "load, warm")
_CHECK_EVERY = 97  # tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path("build/synthetic-checkpoint"))
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--measure", choices=COLD + WARM, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(options.checkpoint, options.measure)))
        return
    _check(options.checkpoint)
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in COLD + WARM}
    for kinds in (COLD, WARM):
        for _ in range(options.repeat):
            for kind in kinds:
                results[kind].append(_in_new_process(options.checkpoint, kind))
    _report(options.checkpoint, results)


def _check(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    for name in sorted(checkpoint.entries)[::_CHECK_EVERY]:
        with safe_open(checkpoint.entries[name].file, framework="pt") as file:
            expected = file.get_tensor(name)
        actual = checkpoint.read(name)
        is_equal = actual.dtype == expected.dtype and _bytes_of(actual) == _bytes_of(expected)
        if not is_equal:
            sys.exit(
                f"{name} is not what the safetensors library reads: no speed is reported of a wrong load"
            )


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _in_new_process(directory: Path, kind: str) -> dict[str, float]:
    if "cold" in kind:
        _drop_from_page_cache(directory)
    command = [sys.executable, __file__, str(directory), "--measure", kind]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output)
    return result


def _drop_from_page_cache(directory: Path) -> None:
    for path in _files(directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _measure(directory: Path, kind: str) -> dict[str, float]:
    work: Callable[[Path], int] = _load if kind.startswith("load") else _read_sequentially
    file_bytes = sum(path.stat().st_size for path in _files(directory))
    _touch_memory(2 * file_bytes if kind in COLD else file_bytes)  # cold, the page cache takes some too
    base = _peak_bytes()
    start = time.perf_counter()
    weight_bytes = work(directory)
    seconds = time.perf_counter() - start
    extra = _peak_bytes() - base - weight_bytes
    return {"seconds": seconds, "gb_per_second": file_bytes / seconds / 1e9, "extra_gib": extra / (1 << 30)}


def _touch_memory(num_bytes: int) -> None:
    torch.empty(num_bytes, dtype=torch.uint8).fill_(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten


def _read_sequentially(directory: Path) -> int:
    """What `cat` does, with a larger buffer. Holds nothing."""
    buffer = bytearray(16 << 20)
    for path in _files(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return 0


def _load(directory: Path) -> int:
    """Bytes of all weights, which are in memory when this returns."""
    config, checkpoint = check_structure(directory)
    weights = load_weights(checkpoint, config, _as_stored, torch.device("cpu"), torch.bfloat16)
    return sum(tensor.nbytes for tensor in _tensors(weights))


def _as_stored(weight: Stored) -> Stored:
    return weight


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _peak_bytes() -> int:
    """Largest resident size of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmHWM")


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _report(directory: Path, results: dict[str, list[dict[str, float]]]) -> None:
    size = sum(path.stat().st_size for path in _files(directory))
    tuning = ", ".join(f"{name}={os.environ[name]}" for name in TUNING)
    machine = f"{processor_name()}, {os.cpu_count()} cores; torch {torch.__version__}; {tuning}"
    print(f"{size / 1e9:.2f} GB; {machine}\n")
    print("| what | GB/s, median (min .. max) | of a cold sequential read | memory beyond the weights |")
    print("| --- | --- | --- | --- |")
    cold = statistics.median(r["gb_per_second"] for r in results[COLD[0]])
    for kind, runs in results.items():
        speeds = [run["gb_per_second"] for run in runs]
        middle = statistics.median(speeds)
        extra = max(run["extra_gib"] for run in runs)
        span = f"{middle:.2f} ({min(speeds):.2f} .. {max(speeds):.2f})"
        print(f"| {kind} | {span} | {middle / cold:.2f} | {extra:.2f} GiB |")


if __name__ == "__main__":
    main()
