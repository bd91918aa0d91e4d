"""Ends a rank when another one is gone.

A rank that waits for a dead one in a GPU collective waits for many minutes, and rank 0, while it has
nothing to do, waits for requests. So a thread waits for a message from each rank that matters: a follower
from rank 0, rank 0 from every follower. The message comes when the group ends in order; where the
connection breaks instead, the process ends at once, and the rest follows.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import NoReturn

import torch
import torch.distributed as dist

logger = logging.getLogger("nybble.ranks")


class Lifeline:
    """`group` is of all ranks, carries nothing else and never times out."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        rank, size = dist.get_rank(), dist.get_world_size()
        self._peers = range(1, size) if rank == 0 else range(1)
        self._threads = [
            threading.Thread(target=self._watch, args=(peer,), name=f"lifeline-{peer}", daemon=True)
            for peer in self._peers
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Take leave of the others and wait until they have."""
        for peer in self._peers:
            dist.send(torch.zeros(1), dst=peer, group=self._group)
        for thread in self._threads:
            thread.join()

    def _watch(self, peer: int) -> None:
        try:
            dist.recv(torch.zeros(1), src=peer, group=self._group)
        except RuntimeError:
            logger.error("rank %d is gone: this rank ends too", peer)
            end_process(1)


def end_process(exit_code: int) -> NoReturn:
    """End without Python's own end, which would abort when a lifeline's thread woke up meanwhile."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(exit_code)
