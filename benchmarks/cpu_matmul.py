"""Speed of the native CPU backend's products: bandwidth for a few tokens, operations for many.

    .venv/bin/python benchmarks/cpu_matmul.py [--threads N] [--levels avx2,avx512vnni] [--calls N]
        [--out FILE]

Each case is checked against float64 before it is timed. Calls of a case and plain reads of memory take turns,
and the median of each is printed. With one thread, which is the default, processor time is measured, so that
other programs disturb little; with more, elapsed time. Weights come from memory: of each matrix there are
copies, more than fit in caches, which take turns too. Layers are the demo model's (16 experts of 96 neurons,
8 at a time, and a shared one of 768) and GLM-4.7's with 16 of its 160 experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from nybble.kernels import fp8
from nybble.kernels.cpu.cpu_matrix import CpuMatrix, dequantize, prepare
from nybble.kernels.cpu.cpu_router import prepare_router
from nybble.kernels.cpu.feed_forward import FeedForward
from nybble.kernels.cpu.linear import linear
from nybble.kernels.cpu.native_library import native_library
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.weight_memory import WeightMemory
from nybble.kernels.ops import MlpWeights, MoeWeights, RmsNorm, RouterWeights
from nybble.kernels.quantized_tensor import NVFP4, QuantizedTensor, stack

READ_BYTES, COLD_BYTES = 1 << 23, 1 << 27
SHAPES = ((3072, 5120), (5120, 1536), (1536, 576), (576, 768))
NUM_TOKENS = (1, 2, 8, 512)
LAYERS = {"demo": (576, 96, 768), "glm": (5120, 1536, 1536)}  # width, neurons of an expert, of the shared one
NUM_EXPERTS, TOP_K = 16, 8


@dataclass(frozen=True)
class Case:
    """num_bytes: of weights that a call reads; num_operations: multiplications and additions in it.
    calls: the same on one copy of the weights after the other."""

    name: str
    calls: Iterator[Callable[[], object]]
    num_bytes: int
    num_operations: int


@dataclass(frozen=True)
class Result:
    """read_gigabytes_per_second: of the plain reads between the calls."""

    level: str
    name: str
    microseconds: float
    gigabytes_per_second: float
    read_gigabytes_per_second: float
    gigaoperations_per_second: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--levels", default=native_library().levels[-1])
    parser.add_argument("--calls", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for level in options.levels.split(","):
        with Pool(options.threads, level) as pool:
            results += measure(pool, cases(pool), options.calls)
    print(markdown(results))
    if options.out:
        report = {
            "threads": options.threads,
            "torch": torch.__version__,
            "results": [asdict(r) for r in results],
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def measure(pool: Pool, cases: Iterable[Case], num_calls: int) -> Iterator[Result]:
    memory = WeightMemory().area(COLD_BYTES).view(torch.int64).fill_(1).split(READ_BYTES // 8)
    reads = cycle([part.sum for part in memory])
    clock = time.thread_time if pool.num_threads == 1 else time.perf_counter
    for case in cases:
        pairs = [(seconds(clock, next(reads)), seconds(clock, next(case.calls))) for _ in range(num_calls)]
        read, taken = (statistics.median(times) for times in zip(*pairs, strict=True))
        yield result(pool.level, case, taken, READ_BYTES / read / 1e9)


def result(level: str, case: Case, taken: float, roof: float) -> Result:
    speed = case.num_bytes / taken / 1e9
    return Result(level, case.name, taken * 1e6, speed, roof, case.num_operations / taken / 1e9)


def seconds(clock: Callable[[], float], call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


def cases(pool: Pool) -> Iterator[Case]:
    for rows, columns in SHAPES:
        for kind, weight in kinds(rows, columns).items():
            matrices = cold(prepare(weight, pool=pool))
            check_product(pool, matrices[0])
            for num_tokens in NUM_TOKENS:
                yield products(pool, kind, matrices, num_tokens)
    for name in LAYERS:
        weights = layer(pool, *LAYERS[name])
        yield from (layer_case(pool, name, weights, num_tokens) for num_tokens in NUM_TOKENS)


def products(pool: Pool, kind: str, matrices: list[CpuMatrix], num_tokens: int) -> Case:
    rows, columns = matrices[0].shape
    x = torch.randn(num_tokens, columns)
    return Case(
        f"{kind} {rows} x {columns}, {num_tokens} tokens",
        cycle([partial(linear, pool, x, matrix) for matrix in matrices]),
        matrices[0].num_bytes,
        2 * num_tokens * rows * columns,
    )


def layer_case(pool: Pool, name: str, layers: list[MoeWeights[CpuMatrix]], num_tokens: int) -> Case:
    """Bytes are those of TOP_K experts for one token, of all for more."""
    feed_forward, weights = FeedForward(pool), layers[0]
    hidden = torch.randn(num_tokens, weights.norm.weight.shape[0])
    routed, shared = mlp_weights(weights.experts), mlp_weights(weights.shared_expert)
    experts = mlp_bytes(weights.experts) * (TOP_K if num_tokens == 1 else NUM_EXPERTS) // NUM_EXPERTS
    return Case(
        f"{name} layer, {num_tokens} tokens",
        cycle([partial(feed_forward.moe, hidden, None, layer) for layer in layers]),
        experts + mlp_bytes(weights.shared_expert),
        2 * num_tokens * (routed * TOP_K // NUM_EXPERTS + shared),
    )


def mlp_bytes(mlp: MlpWeights[CpuMatrix]) -> int:
    return mlp.gate_up.num_bytes + mlp.down.num_bytes


def mlp_weights(mlp: MlpWeights[CpuMatrix]) -> int:
    return sum(torch.Size(matrix.shape).numel() for matrix in (mlp.gate_up, mlp.down))


def check_product(pool: Pool, matrix: CpuMatrix) -> None:
    """Raises AssertionError if the product is not what int8 activations allow."""
    x = torch.randn(3, matrix.num_columns)
    expected = x.double() @ dequantize(matrix).double().T
    error = (linear(pool, x, matrix) - expected).norm() / expected.norm()
    assert error < 8e-3, f"{matrix.shape} at {pool.level}: relative error {error:.2g}"


def kinds(rows: int, columns: int) -> dict[str, Tensor | QuantizedTensor]:
    floats = torch.randn(rows, columns)
    return {"fp4": fp4(rows, columns), "int8": floats, "fp8": fp8.quantize(floats)}


def fp4(rows: int, columns: int) -> QuantizedTensor:
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8)
    scales = (0.5 + torch.rand(rows, columns // 16)).to(torch.float8_e4m3fn)
    return QuantizedTensor(codes, scales, torch.full((rows,), columns**-0.5), NVFP4)


def cold(matrix: CpuMatrix) -> list[CpuMatrix]:
    """Copies that are together more than COLD_BYTES."""
    memory = WeightMemory()
    return [copy(matrix, memory) for _ in range(-(-COLD_BYTES // matrix.num_bytes))]


def copy(matrix: CpuMatrix, memory: WeightMemory) -> CpuMatrix:
    codes, scales = (
        memory.area(part.numel()).view(part.shape).copy_(part) for part in (matrix.codes, matrix.scales)
    )
    return replace(matrix, codes=codes, scales=scales)


def layer(pool: Pool, width: int, neurons: int, shared_neurons: int) -> list[MoeWeights[CpuMatrix]]:
    """Copies of one layer with random routers, together more than COLD_BYTES."""
    gate_up = prepare(stack([fp4(2 * neurons, width)] * NUM_EXPERTS), pool=pool)
    down = prepare(stack([fp4(width, neurons)] * NUM_EXPERTS), pool=pool)
    shared = MlpWeights(prepare(fp4(2 * shared_neurons, width)), prepare(fp4(width, shared_neurons)))
    memory, count = WeightMemory(), -(-COLD_BYTES // (gate_up.num_bytes + down.num_bytes + mlp_bytes(shared)))
    return [
        MoeWeights(
            RmsNorm(torch.ones(width), 1e-5),
            prepare_router(router(width)),
            MlpWeights(copy(gate_up, memory), copy(down, memory)),
            MlpWeights(copy(shared.gate_up, memory), copy(shared.down, memory)),
        )
        for _ in range(count)
    ]


def router(width: int) -> RouterWeights:
    return RouterWeights(torch.randn(NUM_EXPERTS, width), torch.zeros(NUM_EXPERTS), TOP_K, 1, 1, True, 1.0)


def markdown(results: list[Result]) -> str:
    lines = ["| level | what | us | GB/s | of the read | Gop/s |", "| --- | --- | --- | --- | --- | --- |"]
    for r in results:
        share = r.gigabytes_per_second / r.read_gigabytes_per_second
        lines.append(
            f"| {r.level} | {r.name} | {r.microseconds:.0f} | {r.gigabytes_per_second:.1f} | {share:.2f} "
            f"| {r.gigaoperations_per_second:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
