from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.engine.checkpoint import shard_reader
from nybble.engine.checkpoint.shard_reader import Extent, ShardReader
from nybble.engine.errors import CheckpointError

SIZE = 5000


@pytest.fixture(scope="module")
def content() -> torch.Tensor:
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def file(content: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("shards") / "a.safetensors"
    path.write_bytes(content.numpy().tobytes())
    return path


def _expected(extent: Extent, content: torch.Tensor) -> torch.Tensor:
    starts = [extent.offset + row * extent.stride for row in range(extent.num_rows)]
    return torch.cat([content[start : start + extent.row_bytes] for start in starts])


@st.composite
def _extents(draw: st.DrawFn) -> Extent:
    """Within the file, the last row ending wherever it may."""
    row_bytes, num_rows = draw(st.integers(1, 60)), draw(st.integers(1, 40))
    stride = row_bytes + draw(st.sampled_from([0, 1, 7, 60]))
    last = SIZE - (num_rows - 1) * stride - row_bytes
    return Extent("t", Path(), draw(st.integers(0, last) | st.just(last)), num_rows, row_bytes, stride)


@pytest.mark.parametrize("piece_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("page_bytes", [1, 8, 4096])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extents=st.lists(_extents(), max_size=5))
def test_extents_are_read_to_where_they_are_wanted(
    piece_bytes: int,
    page_bytes: int,
    extents: list[Extent],
    file: Path,
    content: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_reader, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(shard_reader, "_PAGE_BYTES", page_bytes)
    rooms = [torch.full((e.num_rows, e.row_bytes), 0x55, dtype=torch.uint8) for e in extents]
    ShardReader().read((replace(e, file=file), room) for e, room in zip(extents, rooms, strict=True))
    for extent, room in zip(extents, rooms, strict=True):
        assert torch.equal(room.flatten(), _expected(extent, content))


def test_a_part_of_a_larger_tensor_is_filled_and_nothing_else(file: Path, content: torch.Tensor) -> None:
    stack = torch.zeros(3, 4, 5, dtype=torch.int32)
    ShardReader().read([(Extent("t", file, 8, 2, 20, 20), stack[1, 1:3])])
    assert torch.equal(stack[1, 1:3].flatten().view(torch.uint8), content[8:48])
    stack[1, 1:3] = 0
    assert not stack.any()


def test_a_file_that_ends_too_early_is_named(file: Path) -> None:
    extent = Extent("model.norm.weight", file, SIZE - 10, 1, 11, 11)
    with pytest.raises(CheckpointError, match=r"a.safetensors: tensor 'model.norm.weight': the file ends"):
        ShardReader().read([(extent, torch.empty(11, dtype=torch.uint8))])


def test_of_several_pieces_the_broken_one_is_named(file: Path) -> None:
    good, bad = Extent("good", file, 0, 1, 9, 9), Extent("bad", file, SIZE, 1, 9, 9)
    rooms = [torch.empty(9, dtype=torch.uint8) for _ in range(3)]
    with pytest.raises(CheckpointError, match="tensor 'bad'"):
        ShardReader().read(zip((good, bad, good), rooms, strict=True))


def test_a_missing_file_is_named(file: Path) -> None:
    extent = Extent("t", file.with_name("gone.safetensors"), 0, 1, 1, 1)
    with pytest.raises(CheckpointError, match=r"gone.safetensors: tensor 't': cannot be read"):
        ShardReader().read([(extent, torch.empty(1, dtype=torch.uint8))])


def test_nothing_wanted_reads_nothing() -> None:
    ShardReader().read([])


def test_after_closing_no_file_is_open(file: Path) -> None:
    def count() -> int:
        return sum(opened.path == str(file) for opened in psutil.Process().open_files())

    reader, room = ShardReader(), torch.empty(4, dtype=torch.uint8)
    for _ in range(2):
        reader.read([(Extent("t", file, 0, 1, 4, 4), room)])
        reader.read([(Extent("t", file, 4, 1, 4, 4), room)])
        assert count() == 1
        reader.close()
        assert count() == 0
