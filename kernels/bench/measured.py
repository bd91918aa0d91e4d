"""The kernel benchmark on a GPU: each case is checked, then timed, then the same inputs go to other
libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.kernels.bench.attention_workloads import cache_bytes
from nybble.kernels.bench.cases import BenchCase, ModelShape
from nybble.kernels.bench.correctness import Deviation, Tolerance, poisoned_memory
from nybble.kernels.bench.inputs import BenchInputs
from nybble.kernels.bench.machine import roof_us
from nybble.kernels.bench.report import MEASURED, OURS, KernelInfo, Omission, Row
from nybble.kernels.bench.timing import Run, Stopwatch, measure
from nybble.kernels.bench.work import case_work
from nybble.kernels.bench.workload import Peer, PeerMissingError, Workload, as_tensor
from nybble.kernels.bench.workloads import make_workload
from nybble.kernels.triton.launch import KernelLaunch, recorded_launches

_MOST_OF_MEMORY = 0.6

Result = Row | Omission


@dataclass(frozen=True)
class Bench:
    """arch: for which kernels are configured.

    free_bytes: memory for a case's cache. read_kernel: what a launch's compiled code takes.
    """

    model: ModelShape
    device: torch.device
    arch: int
    stopwatch: Stopwatch
    roofs: dict[str, float]
    free_bytes: int
    read_kernel: Callable[[KernelLaunch], KernelInfo]
    with_peers: bool = True
    quick: bool = False


def measured_results(case: BenchCase, bench: Bench) -> Iterator[Result]:
    """Ours, then the peers'."""
    if case.op.endswith("attention") and cache_bytes(case, bench.model) > _MOST_OF_MEMORY * bench.free_bytes:
        yield Omission(case.name, OURS, "its cache does not fit in this GPU's memory")
        return
    try:
        workload = make_workload(case, bench.model, BenchInputs(bench.device, bench.arch))
        yield _measured(case, OURS, workload.run, workload.tolerance, workload, bench)
    except ValueError as error:
        yield Omission(case.name, OURS, str(error))
        return
    except torch.OutOfMemoryError:
        yield Omission(case.name, OURS, "it does not fit in this GPU's memory")
        return
    except Exception as error:  # of a compiler or a driver: the other cases go on, and the exit code tells
        yield Omission(case.name, OURS, _described(error), is_fault=True)
        return
    if bench.with_peers:
        yield from (_peer_result(case, peer, workload, bench) for peer in workload.peers)


def _measured(
    case: BenchCase, backend: str, run: Run, tolerance: Tolerance, workload: Workload, bench: Bench
) -> Result:
    output = workload.output if backend == OURS else as_tensor
    found = deviation_of(run, output, workload.judge)
    if not tolerance.admits(found):
        return Omission(case.name, backend, f"wrong: {found}", is_fault=backend == OURS)
    timing = measure(bench.stopwatch, run, quick=bench.quick)
    work = case_work(case, bench.model)
    return Row(
        case=case,
        backend=backend,
        kind=MEASURED,
        median_us=timing.median,
        p10_us=timing.p10,
        p90_us=timing.p90,
        num_bytes=work.num_bytes,
        flops=work.flops,
        roof_us=roof_us(work.num_bytes, work.flops, bench.roofs),
        start=timing.start,
        max_error=found.max_error,
        rms_error=found.rms_error,
        kernels=_kernels(run, bench) if backend == OURS else (),
        repro=f"nybble bench ops {case.options}",
    )


def deviation_of(
    run: Run, output: Callable[[object], Tensor], judge: Callable[[Tensor], Deviation]
) -> Deviation:
    """Of one run in poisoned memory."""
    with poisoned_memory():
        found = run()
    return judge(output(found))


def _peer_result(case: BenchCase, peer: Peer, workload: Workload, bench: Bench) -> Result:
    """Whatever goes wrong in another library is its own affair: the case has no row there, and why."""
    try:
        tolerance = peer.tolerance or workload.tolerance
        return _measured(case, peer.name, peer.prepare(), tolerance, workload, bench)
    except PeerMissingError as error:
        return Omission(case.name, peer.name, str(error))
    except Exception as error:
        return Omission(case.name, peer.name, _described(error))


def _kernels(run: Run, bench: Bench) -> tuple[KernelInfo, ...]:
    """While a run is recorded nothing of ours starts, and what torch computes in it is thrown away."""
    with recorded_launches() as launches:
        run()
    return tuple(bench.read_kernel(recorded) for recorded in launches)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
