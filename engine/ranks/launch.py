"""How the engine's processes are started: one alone, or one for each rank by torch's launcher.

`python -m nybble.engine.ranks.launch NUM_RANKS ARGUMENT...` runs as many engine processes on this machine and
ends when one of them does, with all others (torch.distributed.launcher; `torchrun` is the same for several
machines).
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec

from nybble.engine.engine_config import EngineConfig
from nybble.engine.ranks.launched_rank import is_launched
from nybble.engine.ranks.tuning import TUNING

logger = logging.getLogger("nybble.launch")

REFUSED = 3  # exit code of a rank that cannot start or go on, of which the server knows the reason

_PROCESS = "nybble.engine.engine_process"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def engine_command(config: EngineConfig, socket_path: Path, log_level: int) -> list[str]:
    """The command that runs the engine, with rank 0 connecting to `socket_path`.

    Under torch's launcher this process is one rank's already, and its engine takes that place.
    """
    arguments = [str(socket_path), str(log_level), msgspec.json.encode(config).decode()]
    num_ranks = config.parallel.split.num_ranks
    if num_ranks == 1 or is_launched():
        return [sys.executable, "-m", _PROCESS, *arguments]
    return [sys.executable, "-m", "nybble.engine.ranks.launch", str(num_ranks), *arguments]


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """Variables of the engine's processes. What the user has set stays."""
    variables = dict(TUNING)
    num_ranks = config.parallel.split.num_ranks
    if num_ranks > 1 and not is_launched():
        num_cores = len(os.sched_getaffinity(0))
        variables["OMP_NUM_THREADS"] = str(max(1, num_cores // num_ranks))
        variables["GLOO_SOCKET_IFNAME"] = "lo"  # else it looks for an address of the host's name
    return variables | os.environ


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the one that started it is gone. Linux only."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number.value) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def main() -> None:
    # Here: whoever only wants the command need not wait for torch.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    end_with_parent(signal.SIGTERM)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # says below what is said here
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(sys.argv[1]),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id="nybble",
        local_addr="127.0.0.1",
        max_restarts=0,  # the server starts the engine again
    )
    try:
        elastic_launch(settings, sys.executable)("-m", _PROCESS, *sys.argv[2:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == REFUSED:
            sys.exit(REFUSED)
        logger.error("rank %d ended with exit code %d", rank, failure.exitcode)
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
