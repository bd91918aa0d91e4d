"""What is recorded of operations, and that replays see what has changed since."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from poison import poisoned as poisoned

from nybble.kernels.cpu.add import add
from nybble.kernels.cpu.add_rms_norm import add_rms_norm
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.rows import embed, rotary_angles
from nybble.kernels.ops import Embedding, RmsNorm, RotaryAngles

NORM = RmsNorm(torch.ones(8), 1e-6)


def test_a_replay_repeats_operations_on_what_is_there_then(pool: Pool) -> None:
    ids, table = torch.tensor([1, 2]), torch.randn(5, 8)
    with pool.record() as recording:
        rows = embed(pool, ids, Embedding(table))
        add(pool, rows, rows)
        normed = add_rms_norm(pool, rows, None, NORM)[1]
    ids[:] = torch.tensor([4, 0])
    pool.replay(recording)
    assert torch.equal(rows, 2 * table[[4, 0]])
    assert torch.equal(normed, add_rms_norm(pool, 2 * table[[4, 0]], None, NORM)[1])


def test_what_runs_outside_is_not_recorded(pool: Pool) -> None:
    x = torch.ones(1, 8)
    with pool.record() as recording:
        pass
    add(pool, x, torch.ones(1, 8))
    pool.replay(recording)
    assert torch.equal(x, torch.full((1, 8), 2.0))


def test_operations_that_failed_are_not_recorded(pool: Pool) -> None:
    x = torch.ones(1, 8)
    with pool.record() as recording, pytest.raises(ValueError, match="update is"):
        add(pool, x, torch.ones(1, 7))
    pool.replay(recording)
    assert torch.equal(x, torch.ones(1, 8))


def test_memory_of_results_lives_as_long_as_the_recording(pool: Pool) -> None:
    with pool.record() as recording:
        result = weakref.ref(embed(pool, torch.tensor([0]), Embedding(torch.ones(1, 8))))
    gc.collect()
    assert result() is not None
    del recording
    gc.collect()
    assert result() is None


def test_arguments_are_checked_before_each_replay(pool: Pool) -> None:
    positions, table = torch.tensor([3]), RotaryAngles(cos=torch.randn(4, 2), sin=torch.randn(4, 2))
    x, one = torch.ones(1, 8), torch.ones(1, 8)
    with pool.record() as recording:
        add(pool, x, one)
        angles = rotary_angles(pool, table, positions)
    positions[:] = 4
    with pytest.raises(ValueError, match="positions are 4 to 4, but the table has 4"):
        pool.replay(recording)
    assert torch.equal(x, torch.full((1, 8), 2.0)), "nothing has run"
    positions[:] = 0
    pool.replay(recording)
    assert torch.equal(angles.cos, table.cos[:1])


def test_a_check_is_made_once_for_its_key(pool: Pool) -> None:
    calls: list[str] = []
    with pool.record() as recording:
        for name in ("first", "second"):
            pool.before_replay("key", lambda name=name: calls.append(name))  # type: ignore[misc]
        pool.before_replay("other", lambda: calls.append("other"))
    assert not calls
    pool.replay(recording)
    assert calls == ["first", "other"]


def test_recordings_do_not_nest(pool: Pool) -> None:
    with pool.record(), pytest.raises(AssertionError, match="within a recording"), pool.record():
        pass
    with pool.record():
        pass
