"""Parts run once each, on all threads; threads without work sleep; misuse is an error and never a hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from native_pool import probe, probe_library, probe_path
from processes import wait_until

from nybble.kernels.cpu.pool import Pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(3, library=probe_library()) as pool:
        yield pool


def num_threads() -> int:
    return psutil.Process().num_threads()


@pytest.mark.parametrize("num_parts", [0, 1, 2, 3, 7, 1000])
@pytest.mark.parametrize("num_threads", [1, 2, 3, 16])
def test_every_part_runs_once(num_threads: int, num_parts: int) -> None:
    with Pool(num_threads, library=probe_library()) as pool:
        probed = probe(pool, num_parts)
    assert probed.counts == [1] * num_parts
    assert sum(probed.thread_parts) == num_parts


def test_many_small_regions(pool: Pool) -> None:
    for num_parts in (2, 3, 5):
        assert probe(pool, num_parts, num_regions=20_000).counts == [20_000] * num_parts


def test_regions_after_pauses_that_let_the_threads_sleep(pool: Pool) -> None:
    for pause in (0, 0.0001, 0.0002, 0.005) * 20:
        time.sleep(pause)
        assert probe(pool, 4).counts == [1] * 4


def test_all_threads_take_part(pool: Pool) -> None:
    probed = probe(pool, 300, busy_microseconds=200)
    assert all(parts > 0 for parts in probed.thread_parts)


def test_idle_threads_use_no_processor_time(pool: Pool) -> None:
    probe(pool, 10)
    time.sleep(0.05)  # they spin for less than a millisecond
    before = psutil.Process().threads()
    time.sleep(0.5)
    after = {thread.id: thread.user_time + thread.system_time for thread in psutil.Process().threads()}
    own = threading.get_native_id()
    others = [thread for thread in before if thread.id != own]
    assert len(others) >= 2
    assert sum(after[thread.id] - thread.user_time - thread.system_time for thread in others) < 0.02


def test_callers_take_turns(pool: Pool) -> None:
    counts: list[list[int]] = []

    def call() -> None:
        counts.extend(probe(pool, 5, num_regions=10).counts for _ in range(100))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert counts == [[10] * 5] * 300


def test_an_operation_lets_other_python_threads_run(pool: Pool) -> None:
    running = threading.Thread(target=probe, args=(pool, 3), kwargs={"busy_microseconds": 300_000})
    running.start()
    start = time.monotonic()
    num_turns = 0
    while running.is_alive() and time.monotonic() - start < 10:
        num_turns += 1
        time.sleep(0.001)
    assert num_turns > 10


def test_threads_of_the_pool_are_bound_and_the_caller_is_not() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    with Pool(2, library=probe_library()) as pool:
        cores = {probe(pool, 100, busy_microseconds=100).cores[1] for _ in range(5)}
        assert len(cores - {-1}) == 1
        assert os.sched_getaffinity(0) == allowed


def test_one_core_is_enough() -> None:
    """The affinity is that of a process of its own, so that no other test runs on one core."""
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from native_pool import probe
from nybble.kernels.cpu.native_library import NativeLibrary
from nybble.kernels.cpu.pool import Pool
with Pool(3, library=NativeLibrary({str(probe_path())!r})) as pool:
    assert probe(pool, 5, num_regions=200).counts == [200] * 5
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_scratch_grows_and_stays_usable(pool: Pool) -> None:
    for scratch_bytes in (1, 64, 1_000_003, 10, 0):
        assert probe(pool, 3, scratch_bytes=scratch_bytes).counts == [1] * 3


def test_scratch_beyond_memory_is_an_error_and_the_pool_goes_on(pool: Pool) -> None:
    for scratch_bytes in (1 << 60, (1 << 63) - 1, -1):
        with pytest.raises(MemoryError, match="native CPU backend"):
            probe(pool, 3, scratch_bytes=scratch_bytes)
        assert probe(pool, 3, scratch_bytes=100).counts == [1] * 3


def test_a_forked_process_is_told_to_make_its_own() -> None:
    """In a process of its own: pytest's has threads, which a fork leaves behind."""
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from native_pool import probe
from nybble.kernels.cpu.native_library import NativeLibrary
from nybble.kernels.cpu.pool import Pool
library = NativeLibrary({str(probe_path())!r})
pool = Pool(3, library=library)
while not all(probe(pool, 30, busy_microseconds=100).thread_parts):
    pass  # the address sanitizer cannot be forked while a thread starts
if child := os.fork():
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert probe(pool, 5).counts == [1] * 5
    pool.close()
else:
    try:
        probe(pool, 5)
    except RuntimeError as error:
        assert "a forked process must make its own" in str(error), error
    else:
        raise AssertionError("no error")
    pool.close()
    with Pool(3, library=library) as own:
        assert probe(own, 5, num_regions=100).counts == [100] * 5
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_close_ends_the_threads_and_later_use_is_an_error() -> None:
    before = num_threads()
    pool = Pool(4, library=probe_library())
    assert num_threads() == before + 3
    probe(pool, 5)
    pool.close()
    pool.close()
    wait_until(lambda: num_threads() == before)
    with pytest.raises(RuntimeError, match="closed"):
        probe(pool, 5)


def test_a_dropped_pool_ends_its_threads() -> None:
    before = num_threads()
    pool = Pool(4, library=probe_library())
    del pool
    wait_until(lambda: num_threads() == before)


def test_pools_side_by_side(pool: Pool) -> None:
    with Pool(2, library=probe_library()) as other:
        for _ in range(100):
            assert probe(pool, 3).counts == probe(other, 3).counts == [1] * 3


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_threads is 0"):
        Pool(0)
    with pytest.raises(ValueError, match="level is 'avx1024'; this machine has portable"):
        Pool(1, "avx1024")
