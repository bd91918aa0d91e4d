"""`rank_start.py CONFIG`: a rank that starts, says so, and then waits for requests that never come.

Rank 0 ends, and the others with it, when its standard input closes. A rank that cannot start prints why.
"""

from __future__ import annotations

import sys

import msgspec

from nybble.engine.engine_config import EngineConfig
from nybble.engine.engine_process import run_rank
from nybble.engine.errors import NybbleError
from nybble.engine.ranks.lifeline import end_process
from nybble.engine.ranks.start import start_rank


def main() -> None:
    config = msgspec.json.decode(sys.argv[1], type=EngineConfig)
    end_process(run_rank(lambda: _be_rank(config)))


def _be_rank(config: EngineConfig) -> None:
    try:
        rank = start_rank(config)
    except NybbleError as error:
        print(f"{type(error).__name__}: {error}")
        raise
    print("started", rank.preparation.memory.cache_geometry.num_blocks, flush=True)
    if rank.group.placement.rank == 0:
        sys.stdin.read()
        rank.group.announce_end()
    else:
        rank.worker.follow()
    rank.group.close()


if __name__ == "__main__":
    main()
