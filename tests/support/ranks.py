"""Rank processes without a launcher: each is in the test's hands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import DEADLINE, family, wait_until
from torch.distributed import TCPStore


@dataclass(frozen=True)
class RankProcess:
    """stderr goes to the file `log`."""

    process: subprocess.Popen[str]
    log: Path

    def finish(self) -> str:
        """Its output, once it ended with exit code 0."""
        output, _ = self.process.communicate(timeout=DEADLINE)
        if self.process.returncode:
            raise AssertionError(f"exit code {self.process.returncode}:\n{self.log.read_text()}")
        return output


@contextmanager
def rank_processes(
    script: str, arguments: Sequence[Sequence[str]], logs: Path, num_groups: int = 1
) -> Iterator[list[RankProcess]]:
    """Run a Python file of this folder as many ranks as there are `arguments`; each gets its own.

    The ranks meet in a store of this process, as they do in a store of torch's launcher. A process that
    makes one group after the other finds the store of each in MASTER_PORTS.
    """
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(num_groups)]
    ports = ",".join(str(store.port) for store in stores)
    command = [sys.executable, str(Path(__file__).with_name(script))]
    with ExitStack() as stack, family() as processes:
        ranks = []
        for rank, own in enumerate(arguments):
            variables = _variables(rank, len(arguments), ports)
            log = logs / f"{script}-{rank}.log"
            with log.open("w") as errors:
                process = subprocess.Popen(
                    [*command, *own],
                    env=processes.environment | variables,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            ranks.append(RankProcess(stack.enter_context(process), log))
        yield ranks


def exit_codes(ranks: Sequence[RankProcess], seconds: float = DEADLINE) -> list[int | None]:
    """Once all have ended, which must be within `seconds`."""
    wait_until(lambda: all(item.process.poll() is not None for item in ranks), seconds)
    return [item.process.returncode for item in ranks]


def _variables(rank: int, num_ranks: int, ports: str) -> dict[str, str]:
    """What torch's launcher would set."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": ports.split(",")[0],
        "MASTER_PORTS": ports,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
