"""How the engine's processes are started, and that they end with what started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from processes import DEADLINE, family, wait_until

from nybble.engine.engine_config import EngineConfig, ParallelConfig
from nybble.engine.ranks.launch import engine_command, engine_environment

ONE = EngineConfig(checkpoint="somewhere")
FOUR = EngineConfig(
    checkpoint="somewhere",
    parallel=ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2),
)
SOCKET = Path("/run/socket")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by torchrun, which sets OMP_NUM_THREADS itself."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")


def test_one_rank_needs_no_launcher() -> None:
    command = engine_command(ONE, SOCKET, 20)
    assert command[:3] == [sys.executable, "-m", "nybble.engine.engine_process"]
    assert command[3:5] == [str(SOCKET), "20"]
    assert msgspec.json.decode(command[5], type=EngineConfig) == ONE


def test_several_ranks_get_one() -> None:
    command = engine_command(FOUR, SOCKET, 20)
    assert command[:4] == [sys.executable, "-m", "nybble.engine.ranks.launch", "4"]
    assert command[4:6] == [str(SOCKET), "20"]
    assert msgspec.json.decode(command[6], type=EngineConfig) == FOUR


def test_a_launched_server_starts_only_its_own_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch)
    command = engine_command(FOUR, SOCKET, 20)
    assert command[:3] == [sys.executable, "-m", "nybble.engine.engine_process"]
    assert "OMP_NUM_THREADS" not in engine_environment(FOUR)
    assert "GLOO_SOCKET_IFNAME" not in engine_environment(FOUR)  # the other ranks may be elsewhere


@pytest.mark.parametrize(("num_cores", "threads"), [(2, "1"), (4, "1"), (9, "2"), (64, "16")])
def test_ranks_divide_the_cores(num_cores: int, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    environment = engine_environment(FOUR)
    assert environment["OMP_NUM_THREADS"] == threads
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert "OMP_NUM_THREADS" not in engine_environment(ONE)


@pytest.mark.parametrize("config", [ONE, FOUR])
def test_what_the_user_sets_stays(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth7", "GOMP_SPINCOUNT": "5", "OTHER": "x"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert os.environ.items() <= engine_environment(config).items()


CHILD = """
import signal, sys, time
from nybble.engine.ranks.launch import end_with_parent
end_with_parent(signal.Signals(int(sys.argv[1])))
print("ready", flush=True)
time.sleep(1000)
"""
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_its_killed_parent(number: signal.Signals) -> None:
    with family() as processes:
        command = [sys.executable, "-c", PARENT, CHILD, str(number.value)]
        environment = processes.environment
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "ready\n"
            assert len(processes.members()) == 2
            parent.kill()
        wait_until(processes.is_gone, DEADLINE)
