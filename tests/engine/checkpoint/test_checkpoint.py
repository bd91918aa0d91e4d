from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from safetensors_file import entry, write, write_index, write_raw

from nybble.engine.checkpoint import checkpoint as checkpoint_module
from nybble.engine.checkpoint.checkpoint import Checkpoint, Span
from nybble.engine.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.codes": torch.arange(8, dtype=torch.uint8).reshape(2, 4),
    "c.scale": torch.tensor(2.5),
    "d.bf16": torch.full((3,), 1.5, dtype=torch.bfloat16),
    "e.fp8": torch.tensor([[0.5, 448.0]]).to(torch.float8_e4m3fn),
    "f.empty": torch.empty(0, 4),
}
SHARDS = {
    "one.safetensors": ["a.weight", "e.fp8"],
    "two.safetensors": ["b.codes", "c.scale", "d.bf16", "f.empty"],
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for file, names in SHARDS.items():
        save_file({name: TENSORS[name] for name in names}, tmp_path / file, {"format": "pt"})
    write_index(tmp_path, {name: file for file, names in SHARDS.items() for name in names})
    return tmp_path


def _assert_refused(directory: Path, *mentions: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    for mention in mentions:
        assert mention in str(caught.value)


# Whole checkpoints.


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_every_tensor_is_found_and_read(layout: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint.open(request.getfixturevalue(layout))
    assert checkpoint.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert checkpoint.entries[name].shape == tuple(tensor.shape)
        assert checkpoint.entries[name].name == name
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read.float(), tensor.float())
    dtypes = [checkpoint.entries[name].dtype for name in TENSORS]
    assert dtypes == ["F32", "U8", "F32", "BF16", "F8_E4M3", "F32"]


def test_an_entry_says_where_it_lies(sharded: Path) -> None:
    found = Checkpoint.open(sharded).entries["b.codes"]
    assert found.file == sharded / "two.safetensors"
    assert str(found) == "two.safetensors: tensor 'b.codes'"


def test_opening_reads_no_data(single: Path) -> None:
    """A file that is all hole behind its header opens at once, whatever its size."""
    path = single / "model.safetensors"
    size = 1 << 38
    write(path, {"huge": entry("U8", [size], 0, size)})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    assert Checkpoint.open(single).entries["huge"].shape == (size,)


def test_the_index_decides_where_there_are_both(sharded: Path) -> None:
    save_file({"other": torch.zeros(1)}, sharded / "model.safetensors")
    assert Checkpoint.open(sharded).entries.keys() == TENSORS.keys()


# Spans.

SPANNED = {
    "f32": torch.arange(35, dtype=torch.float32).reshape(5, 7),
    "bf16": torch.arange(35).bfloat16().reshape(5, 7),
    "u8": torch.arange(35, dtype=torch.uint8).reshape(5, 7),
    "fp8": torch.arange(35).to(torch.float8_e4m3fn).reshape(5, 7),
    "vector": torch.arange(5, dtype=torch.float32),
}
SPANS = [
    Span(axis, start, stop)
    for axis, size in ((0, 5), (1, 7))
    for start in range(size)
    for stop in range(start + 1, size + 1)
]


@pytest.fixture(scope="module")
def spanned(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("spanned")
    save_file(SPANNED, directory / "model.safetensors")
    return Checkpoint.open(directory)


@pytest.mark.parametrize("name", SPANNED)
def test_a_span_is_a_slice(name: str, spanned: Checkpoint) -> None:
    whole = SPANNED[name]
    for span in (span for span in SPANS if span.axis < whole.ndim):
        read = spanned.read(name, span)
        assert read.dtype == whole.dtype
        assert read.is_contiguous()
        expected = whole.float().narrow(span.axis, span.start, span.stop - span.start)
        assert torch.equal(read.float(), expected), span


@pytest.mark.parametrize("span", [None, Span(0, 0, 1)])
def test_reading_again_after_closing(span: Span | None, single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    first = checkpoint.read("a.weight", span)
    checkpoint.close()
    assert torch.equal(checkpoint.read("a.weight", span), first)


def test_copies_are_told_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are compared at a time."""
    first = torch.randn(23, 5)
    changed, nan = first.clone(), first.clone()
    changed[22, 4] += 1
    nan[0, 0] = torch.nan
    tensors = {"first": first, "copy": first.clone(), "changed": changed, "nan": nan, "nans": nan.clone()}
    tensors |= {"other dtype": first.double(), "other shape": first[:22].clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    for limit in (1, 60, 1 << 20):
        monkeypatch.setattr(checkpoint_module, "_COMPARED_BYTES", limit)
        checkpoint = Checkpoint.open(tmp_path)
        assert checkpoint.is_copy("copy", "first") and checkpoint.is_copy("nans", "nan")
        assert not any(
            checkpoint.is_copy(n, "first") for n in ("changed", "nan", "other dtype", "other shape")
        )
        assert checkpoint.is_copy("changed", "first", Span(0, 3, 22))
        assert not checkpoint.is_copy("changed", "first", Span(0, 3, 23))


def test_a_span_of_a_file_that_vanished_is_named(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    (single / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=re.escape("tensor 'a.weight': cannot be read")):
        checkpoint.read("a.weight", Span(1, 0, 1))


# The directory and the index.


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    _assert_refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such checkpoint directory")


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    _assert_refused(tmp_path, str(tmp_path), "has neither model.safetensors.index.json nor model.safetensors")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    _assert_refused(sharded, "two.safetensors: file is missing", str(sharded))


@pytest.mark.parametrize("weight_map", [None, {}, [], "two.safetensors"], ids=repr)
def test_an_index_without_a_map_is_named(weight_map: object, sharded: Path) -> None:
    write_index(sharded, weight_map)
    _assert_refused(sharded, "model.safetensors.index.json", "'weight_map'")


def test_an_index_that_is_not_json_is_named(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{")
    _assert_refused(sharded, "model.safetensors.index.json: not readable as JSON")


def test_an_index_that_names_a_tensor_not_in_the_file(sharded: Path) -> None:
    names = {name: file for file, names in SHARDS.items() for name in names}
    write_index(sharded, names | {"g.ghost": "one.safetensors"})
    _assert_refused(sharded, "one.safetensors", "'g.ghost'", "is not in it")


def test_an_index_that_names_the_wrong_file(sharded: Path) -> None:
    names = {name: file for file, names in SHARDS.items() for name in names}
    write_index(sharded, names | {"a.weight": "two.safetensors"})
    _assert_refused(sharded, "two.safetensors", "'a.weight'", "is not in it")


@pytest.mark.parametrize(
    "file", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", 5, None], ids=repr
)
def test_an_index_cannot_leave_the_directory(file: object, sharded: Path) -> None:
    write_index(sharded, {"a.weight": file})
    _assert_refused(sharded, "'a.weight'", repr(file), "not a file name")


def test_a_tensor_in_two_files_is_named(sharded: Path) -> None:
    save_file({"a.weight": torch.zeros(1), "b.codes": torch.zeros(1)}, sharded / "two.safetensors")
    _assert_refused(sharded, "two.safetensors: tensor 'a.weight'", "one.safetensors too")


# One file.


@pytest.mark.parametrize("num_bytes", [0, 4, 7, 8, 9, 60])
def test_a_file_that_ends_in_its_header(num_bytes: int, single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    _assert_refused(single, "model.safetensors: truncated or not a safetensors file")


def test_a_file_that_ends_in_its_data(single: Path) -> None:
    """Cut anywhere, it names the tensor that is cut."""
    path = single / "model.safetensors"
    content = path.read_bytes()
    [length] = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name, last = max(
        ((name, fields["data_offsets"][1]) for name, fields in header.items() if name != "__metadata__"),
        key=lambda pair: pair[1],
    )
    assert len(content) == 8 + length + last
    path.write_bytes(content[:-1])
    _assert_refused(single, f"model.safetensors: tensor '{name}'", f"truncated: its data ends at byte {last}")


@pytest.mark.parametrize("length", [0, 1, 18, 10**9, 2**64 - 1])
def test_a_header_length_that_cannot_be(length: int, tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", b'{"__metadata__":{}}'[:17], length=length)
    _assert_refused(tmp_path, "model.safetensors: truncated or not a safetensors file")


@pytest.mark.parametrize("header", [b"garbage!", b"\xff\xfe\xfd\xfc", b'{"a": ', b"  "], ids=repr)
def test_a_header_that_is_not_json(header: bytes, tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", header)
    _assert_refused(tmp_path, "model.safetensors: not a readable safetensors file")


@pytest.mark.parametrize("header", [b"[]", b"null", b" 5", b'"model"'], ids=repr)
def test_a_header_that_is_not_an_object(header: bytes, tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", header)
    _assert_refused(tmp_path, "model.safetensors: its header is not a JSON object")


@pytest.mark.parametrize(
    "fields",
    [
        None,
        5,
        [],
        "F32",
        {},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": 5, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": None},
    ],
    ids=str,
)
def test_a_malformed_entry_is_named(fields: object, tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"good": entry("F32", [1], 0, 4), "bad": fields}, bytes(8))
    _assert_refused(tmp_path, "model.safetensors: tensor 'bad': malformed header entry")


@pytest.mark.parametrize(
    ("dtype", "shape", "start", "end", "message"),
    [
        ("F4", [2], 0, 1, "dtype F4 is not known"),
        ("float32", [1], 0, 4, "dtype float32 is not known"),
        ("F32", [2], 0, 4, "4 bytes do not hold F32 [2]"),
        ("F32", [], 0, 8, "8 bytes do not hold F32 []"),
        ("BF16", [2, 3], 0, 8, "8 bytes do not hold BF16 [2, 3]"),
        ("F32", [1], 4, 0, "-4 bytes do not hold F32 [1]"),
        ("F32", [3], 0, 12, "truncated: its data ends at byte 12 of 8 in the file"),
        ("F32", [1], 4, 8, "its data starts at byte 4, expected 0"),
        ("F32", [1], -4, 0, "its data starts at byte -4, expected 0"),
        ("F32", [-1, -1], 0, 4, "shape [-1, -1] is not one"),
        ("F32", [1.9], 0, 4, "shape [1.9] is not one"),
        ("F32", ["1"], 0, 4, "shape ['1'] is not one"),
        ("F32", [None], 0, 4, "shape [None] is not one"),
        ("F32", [1e999], 0, 4, "shape [inf] is not one"),
    ],
)
def test_a_wrong_entry_is_named(
    dtype: str, shape: list[int], start: int, end: int, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "model.safetensors", {"bad": entry(dtype, shape, start, end)}, bytes(8))
    _assert_refused(tmp_path, f"model.safetensors: tensor 'bad': {message}")


def test_tensors_that_overlap_are_named(tmp_path: Path) -> None:
    header = {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}
    write(tmp_path / "model.safetensors", header, bytes(4))
    _assert_refused(tmp_path, "model.safetensors: tensor 'b': its data starts at byte 0, expected 4")


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": entry("F32", [1], 0, 4)}, bytes(7))
    _assert_refused(tmp_path, "model.safetensors: 3 bytes follow the last tensor")


def test_a_header_nested_too_deeply(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", b"[" * 100_000)
    _assert_refused(tmp_path, "model.safetensors: not a readable safetensors file")


def test_a_shard_that_is_a_directory_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    (sharded / "two.safetensors").mkdir()
    _assert_refused(sharded, "two.safetensors")


def test_a_file_that_vanishes_after_opening_is_named(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    (single / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=re.escape("model.safetensors: tensor 'c.scale': cannot be read")
    ):
        checkpoint.read("c.scale")
