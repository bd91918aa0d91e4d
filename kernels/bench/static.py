"""The kernel benchmark with no GPU: what the compiled kernels take, and times modelled from that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from nybble.kernels.bench.cases import BenchCase, ModelShape
from nybble.kernels.bench.gpu_models import GpuModel
from nybble.kernels.bench.model import model_time
from nybble.kernels.bench.report import MODELLED, OURS, KernelInfo, Omission, Row
from nybble.kernels.bench.routing import expert_counts, expert_ids
from nybble.kernels.bench.work import case_work, seen_pairs
from nybble.kernels.bench.workloads import meta_workload
from nybble.kernels.compiled.aot import launch_resources
from nybble.kernels.compiled.loop_pass import argument, kernel_name, loop_pass
from nybble.kernels.compiled.resource_report import Case, KernelReport, LoopLimits, ReportError, report_case
from nybble.kernels.triton.launch import KernelLaunch, launch, recorded_launches

_THREADS_PER_WARP = 32


def static_results(
    cases: Sequence[BenchCase], model: ModelShape, gpu: GpuModel, num_processes: int
) -> Iterator[Row | Omission]:
    """In the order of `cases`, compiled by several processes."""
    one = partial(static_result, model=model, gpu=gpu)
    if num_processes == 1 or len(cases) == 1:
        yield from map(one, cases)
        return
    pool = ProcessPoolExecutor(num_processes, get_context("spawn"))
    try:
        yield from pool.map(one, cases)
    finally:  # whoever takes no more results does not wait for them
        pool.shutdown(cancel_futures=True)


def static_result(case: BenchCase, model: ModelShape, gpu: GpuModel) -> Row | Omission:
    try:
        launches = case_launches(case, model, gpu.arch)
        reports = [launch_report(recorded, gpu.arch) for recorded in launches]
    except ValueError as error:
        return Omission(case.name, OURS, str(error))
    except ReportError as error:
        return Omission(case.name, OURS, str(error), is_fault=True)
    if not launches:
        return Omission(case.name, OURS, "no kernel of ours: it is torch's own product")
    return _row(case, model, gpu, launches, reports)


def case_launches(case: BenchCase, model: ModelShape, arch: int) -> list[KernelLaunch]:
    """What a case launches. Raises ValueError as `make_workload`."""
    with recorded_launches() as launches:
        meta_workload(case, model, arch).run()
    return launches


def launch_report(recorded: KernelLaunch, arch: int) -> KernelReport:
    """Of one launch, with the instructions of its hot loop for each item. Raises ReportError."""
    name, loop = kernel_name(recorded), loop_pass(recorded)
    limits = {}
    if loop is not None:
        limits = {name: LoopLimits(loop.items, math.inf, loaded_bytes=loop.loaded_bytes)}
    again = partial(launch, recorded.kernel, recorded.grid, *recorded.arguments, **recorded.options)
    (report,) = report_case(Case(name, again, limits), partial(launch_resources, arch=arch)).values()
    return report


def read_kernel(recorded: KernelLaunch, arch: int) -> KernelInfo:
    """Raises ReportError."""
    return _kernel_info(recorded, launch_report(recorded, arch))


def _kernel_info(recorded: KernelLaunch, report: KernelReport) -> KernelInfo:
    loop = report.hot_loop
    return KernelInfo(
        kernel_name(recorded),
        report.registers,
        report.stack_bytes,
        report.shared_bytes,
        report.num_warps,
        loop.instructions_per_item if loop else None,
    )


def _row(
    case: BenchCase,
    model: ModelShape,
    gpu: GpuModel,
    launches: Sequence[KernelLaunch],
    reports: Sequence[KernelReport],
) -> Row:
    work = case_work(case, model)
    pairs = list(zip(launches, reports, strict=True))
    instructions = sum(_instructions(case, model, recorded, report) for recorded, report in pairs)
    modelled = model_time(work, instructions, len(launches), gpu)
    return Row(
        case=case,
        backend=OURS,
        kind=MODELLED,
        median_us=modelled.us,
        p10_us=modelled.us,
        p90_us=modelled.us,
        num_bytes=work.num_bytes,
        flops=work.flops,
        roof_us=modelled.roof_us,
        start=f"bound by {modelled.bound}",
        max_error=None,
        rms_error=None,
        kernels=tuple(_kernel_info(*pair) for pair in pairs),
        repro=f'nybble bench ops --static --gpu "{gpu.name}" {case.options}',
    )


def _instructions(case: BenchCase, model: ModelShape, recorded: KernelLaunch, report: KernelReport) -> float:
    """Of single threads."""
    per_item = report.hot_loop.instructions_per_item if report.hot_loop else None
    if per_item is not None:
        return per_item * num_items(case, model, recorded)
    threads = math.prod(recorded.grid) * report.num_warps * _THREADS_PER_WARP
    return float(threads * report.instructions)


def num_items(case: BenchCase, model: ModelShape, recorded: KernelLaunch) -> float:
    """Weights or elements of the cache that all blocks of a launch read, each time that one does."""
    name, shard = kernel_name(recorded), model.shard(case.tp)
    if name == "_split_kernel":
        return 2.0 * case.tokens * (case.context or 0) * shard.heads.kv_width
    if name == "_prefill_kernel":
        tokens_a_block = recorded.options["ROWS"] / recorded.options["GROUP"]
        return float(2 * seen_pairs(case) / tokens_a_block * shard.heads.kv_width)
    if name in ("_gate_up_kernel", "_down_kernel"):
        return case.tokens * (shard.top_k + 1) * _expert_matrix(name, shard)
    if name.endswith(("_gate_up_kernel", "_down_kernel")):
        return num_tiles(case, shard, recorded.options["TOKENS"]) * _expert_matrix(name, shard)
    is_router = "_logits" in name
    rows = recorded.options["BLOCK_E" if is_router else "ROWS"]
    width = argument(recorded, "split_width" if is_router else "width")
    return float(math.prod(recorded.grid) * rows * width)


def _expert_matrix(name: str, shard: ModelShape) -> int:
    return (2 if "gate_up" in name else 1) * shard.expert_width * shard.hidden


def num_tiles(case: BenchCase, shard: ModelShape, block_tokens: int) -> int:
    """Of tokens of one expert: the grid has room for more."""
    ids = expert_ids(case.tokens, shard.num_experts, shard.top_k, case.routing or "uniform")
    return sum(math.ceil(count / block_tokens) for count in expert_counts(ids, shard.num_experts))
