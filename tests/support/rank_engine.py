"""Run an engine over one set of requests after the other, alone or as one of its ranks.

As a script, `rank_engine.py CASES`: a rank that runs the JSON file's cases in turn; rank 0 prints what each
one generated.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
from running import run, tokens

from nybble.engine.engine import Engine
from nybble.engine.engine_config import EngineConfig
from nybble.engine.loading import build_engine
from nybble.engine.messages import Request
from nybble.engine.ranks.start import start_rank

Tokens = dict[str, list[int]]  # of each request


class Case(msgspec.Struct, frozen=True):
    """Requests of a batch run together, the batches one after the other."""

    config: EngineConfig
    batches: tuple[tuple[Request, ...], ...]


class Generated(msgspec.Struct, frozen=True):
    """num_accepted: drafts that were right."""

    tokens: Tokens
    num_accepted: int


def generate(engine: Engine, case: Case) -> Generated:
    generated: Tokens = {}
    for batch in case.batches:
        generated |= {name: tokens(events) for name, events in run(engine, *batch).items()}
    speculation = engine.stats().speculation
    return Generated(generated, sum(speculation.num_accepted) if speculation else 0)


def _run_rank(case: Case) -> Generated | None:
    rank = start_rank(case.config)
    if rank.group.placement.rank:
        rank.worker.follow()
        rank.group.close()
        return None
    generated = generate(build_engine(rank.preparation, rank.worker, rank.group), case)
    rank.group.announce_end()
    rank.group.close()
    return generated


def main() -> None:
    cases = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=list[Case])
    results = []
    for case, port in zip(cases, os.environ["MASTER_PORTS"].split(","), strict=True):
        os.environ["MASTER_PORT"] = port
        results.append(_run_rank(case))
    if results[0] is not None:
        print(msgspec.json.encode(results).decode())


if __name__ == "__main__":
    main()
