"""Ranks start together or not at all, and all know why not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from ranks import exit_codes, rank_processes
from running import tiny_config
from safetensors.torch import load_file, save_file
from tiny_glm import make_checkpoint

from nybble.engine.checkpoint.quantize_checkpoint import quantize_checkpoint
from nybble.engine.checkpoint.quantize_recipe import QuantizeRecipe
from nybble.engine.engine_config import EngineConfig, ParallelConfig
from nybble.engine.errors import OptionError
from nybble.engine.ranks.launch import REFUSED
from nybble.engine.ranks.start import start_rank

WEIGHT = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("glm")
    make_checkpoint(root / "source")
    file = root / "source" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    quantize_checkpoint(root / "source", root / "nvfp4", QuantizeRecipe("nvfp4"))
    return root / "nvfp4"


def _config(checkpoint: Path) -> EngineConfig:
    return replace(tiny_config(checkpoint), parallel=ParallelConfig(tensor_parallel_size=2))


def _refusals(configs: Sequence[EngineConfig], logs: Path) -> list[str]:
    """What each rank says, all of which must end as refused."""
    arguments = [[msgspec.json.encode(config).decode()] for config in configs]
    with rank_processes("rank_start.py", arguments, logs) as ranks:
        assert exit_codes(ranks) == [REFUSED] * len(ranks)
        assert [rank.log.read_text() for rank in ranks] == [""] * len(ranks)
        return [rank.process.communicate()[0] for rank in ranks]


def _shard(directory: Path) -> Path:
    return next(directory.glob("*.safetensors"))


def _truncate(directory: Path) -> None:
    os.truncate(_shard(directory), _shard(directory).stat().st_size - 10)


def _spoil_a_scale(directory: Path) -> None:
    """Seen only when rank 1 reads its share of the tensor, the rows 16 to 31."""
    tensors = load_file(_shard(directory))
    tensors[f"{WEIGHT}_scale"].view(torch.uint8)[20, 1] = 0x7F  # NaN in E4M3
    save_file(tensors, _shard(directory))


@pytest.mark.parametrize(("damage", "names"), [(_truncate, []), (_spoil_a_scale, [WEIGHT])])
def test_what_is_wrong_on_one_rank_all_report(
    quantized: Path, tmp_path: Path, damage: Callable[[Path], None], names: list[str]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(quantized, bad)
    damage(bad)
    first, second = _refusals([_config(quantized), _config(bad)], tmp_path)
    assert first == second
    assert first.startswith("RanksFailedError: rank 1: ")
    assert [name for name in [_shard(bad).name, *names] if name not in first] == []
    assert first.count("\n") == 1


def test_what_is_wrong_on_all_is_said_once(quantized: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(quantized, bad)
    _truncate(bad)
    first, second = _refusals([_config(bad)] * 2, tmp_path)
    assert first == second
    assert first.startswith("RanksFailedError: ") and "rank" not in first.removeprefix("RanksFailedError: ")


@pytest.mark.parametrize("differs", ["option", "checkpoint"])
def test_ranks_that_differ(quantized: Path, tmp_path: Path, differs: str) -> None:
    if differs == "option":
        other = replace(_config(quantized), max_model_len=100)
    else:
        make_checkpoint(tmp_path / "other")
        other = _config(tmp_path / "other")
    first, second = _refusals([_config(quantized), other], tmp_path)
    assert first == second
    assert "rank 1 has other options or another checkpoint than rank 0" in first
    assert "same command and the same files" in first


def test_the_smaller_cache_is_that_of_all(quantized: Path, tmp_path: Path) -> None:
    small, large = (
        replace(_config(quantized), cache=replace(_config(quantized).cache, kv_cache_memory=gib))
        for gib in (0.02, 0.03)
    )
    arguments = [[msgspec.json.encode(config).decode()] for config in (large, small)]
    with rank_processes("rank_start.py", arguments, tmp_path) as ranks:
        first, second = (rank.finish() for rank in ranks)
    assert first == second
    assert first.startswith("started ")


@pytest.mark.parametrize("num_started", ["1", "4"])
def test_another_number_of_ranks(quantized: Path, num_started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before any other rank is waited for."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", num_started)
    with pytest.raises(OptionError, match=f"calls for 2 ranks, but {num_started} were started"):
        start_rank(_config(quantized))
