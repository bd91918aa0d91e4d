"""BF16 to FP4: the bytes, the resumption, and that the result serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import random_prompt, request, run, tiny_config, tiny_engine, tokens
from safetensors.torch import load_file, save_file
from tiny_glm import make_checkpoint

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.layouts import (
    COMPRESSED_MXFP4,
    FLOATS,
    FP8_PER_CHANNEL,
    MODELOPT_NVFP4,
    find_layout,
)
from nybble.engine.checkpoint.quantize_checkpoint import quantize_checkpoint
from nybble.engine.checkpoint.quantize_recipe import QuantizeRecipe, tensor_class
from nybble.engine.errors import CheckpointError, OptionError
from nybble.engine.loading import prepare
from nybble.kernels import fp8, mxfp4, nvfp4

NVFP4_RECIPE = QuantizeRecipe("nvfp4")
GATE, UP, DOWN = (f"model.layers.1.mlp.experts.2.{name}_proj" for name in ("gate", "up", "down"))
QUERY = "model.layers.2.self_attn.q_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 checkpoint in three shards that part MLPs, with a draft layer and a tokenizer file."""
    directory = tmp_path_factory.mktemp("source")
    make_checkpoint(directory, seed=21, num_mtp_layers=1)
    tensors = {name: t.bfloat16() for name, t in load_file(directory / "model.safetensors").items()}
    tensors["model.layers.3.eh_proj.weight"] = torch.randn(64, 128).bfloat16()
    (directory / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, directory / file)
        weight_map |= dict.fromkeys(names[number::3], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "chat_template.jinja").write_text("template")
    return directory


def _bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_nvfp4_by_the_recipe_byte_for_byte(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", NVFP4_RECIPE)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    gate, up, down = (before.read(f"{name}.weight") for name in (GATE, UP, DOWN))
    shared = nvfp4.global_scale(gate, up)
    for name, expected in (
        (GATE, nvfp4.quantize(gate, shared)),
        (UP, nvfp4.quantize(up, shared)),
        (DOWN, nvfp4.quantize(down)),
    ):
        assert find_layout(name, after.entries) is MODELOPT_NVFP4
        assert torch.equal(after.read(f"{name}.weight"), expected.codes)
        assert expected.global_scales is not None
        assert after.read(f"{name}.weight_scale_2") == expected.global_scales[0]


@pytest.mark.parametrize(
    ("recipe", "expert_layout", "attention_layout"),
    [
        (QuantizeRecipe("nvfp4"), MODELOPT_NVFP4, FLOATS),
        (QuantizeRecipe("nvfp4", "fp8"), MODELOPT_NVFP4, FP8_PER_CHANNEL),
        (QuantizeRecipe("nvfp4", "nvfp4"), MODELOPT_NVFP4, MODELOPT_NVFP4),
        (QuantizeRecipe("mxfp4"), COMPRESSED_MXFP4, FLOATS),
        (QuantizeRecipe("mxfp4", "fp8"), COMPRESSED_MXFP4, FP8_PER_CHANNEL),
    ],
    ids=str,
)
def test_every_recipe_loads_and_serves(
    source: Path, tmp_path: Path, recipe: QuantizeRecipe, expert_layout: object, attention_layout: object
) -> None:
    quantize_checkpoint(source, tmp_path / "out", recipe)
    entries = Checkpoint.open(tmp_path / "out").entries
    assert find_layout(DOWN, entries) is expert_layout
    assert find_layout(QUERY, entries) is attention_layout
    config = tiny_config(tmp_path / "out")
    prepare(config)  # its declaration fits its tensors
    events = run(tiny_engine(config), request("a", random_prompt(20, seed=1), 8))
    assert len(tokens(events["a"])) == 8


def test_what_is_not_quantized_is_kept_to_the_bit(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", QuantizeRecipe("nvfp4", "nvfp4"))
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    kept = [name for name in before.entries if tensor_class(name.removesuffix(".weight")) is None]
    assert "model.layers.3.eh_proj.weight" in kept and "model.layers.1.mlp.gate.weight" in kept
    for name in kept:
        assert torch.equal(before.read(name), after.read(name)), name
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "template"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in source.iterdir()}


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "whole", NVFP4_RECIPE)
    num_calls = 0

    def interrupt_at(count: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls in (5, 60, 110):
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, tmp_path / "parts", NVFP4_RECIPE, interrupt_at)
        assert not (tmp_path / "parts").exists()
    errors = quantize_checkpoint(source, tmp_path / "parts", NVFP4_RECIPE, interrupt_at)
    assert _bytes(tmp_path / "parts") == _bytes(tmp_path / "whole")
    assert len(errors) == 3 + 2 * (8 + 1) * 3  # of all shards, also those of the first runs


def test_progress_adds_up_to_the_source(source: Path, tmp_path: Path) -> None:
    counts: list[int] = []
    quantize_checkpoint(source, tmp_path / "out", NVFP4_RECIPE, counts.append)
    assert sum(counts) == sum(entry.num_bytes for entry in Checkpoint.open(source).entries.values())


def test_report_measures_the_error(source: Path, tmp_path: Path) -> None:
    errors = {
        e.name: e for e in quantize_checkpoint(source, tmp_path / "out", QuantizeRecipe("mxfp4", "fp8"))
    }
    checkpoint = Checkpoint.open(source)
    for name, quantize in ((DOWN, mxfp4.quantize), (QUERY, fp8.quantize)):
        weight = checkpoint.read(f"{name}.weight").float()
        expected = (quantize(weight).dequantize() - weight).norm() / weight.norm()
        assert errors[name].relative == pytest.approx(expected.item(), rel=1e-5)
    assert {e.tensor_class for e in errors.values()} == {
        "attention", "dense MLP", "routed experts", "shared experts",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.gate_proj", "dense MLP"),
        ("model.layers.5.mlp.experts.12.down_proj", "routed experts"),
        ("model.layers.5.mlp.shared_experts.up_proj", "shared experts"),
        ("model.layers.5.self_attn.o_proj", "attention"),
        ("model.layers.5.mlp.gate", None),
        ("lm_head", None),
        ("model.layers.5.self_attn.q_norm", None),
    ],
)
def test_classes(name: str, expected: str | None) -> None:
    assert tensor_class(name) == expected


def test_refusals(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", NVFP4_RECIPE)
    with pytest.raises(CheckpointError, match="out: exists already"):
        quantize_checkpoint(source, tmp_path / "out", NVFP4_RECIPE)
    with pytest.raises(
        CheckpointError, match=r"tensor 'model.layers.0.mlp.gate_proj.weight': is quantized already"
    ):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", NVFP4_RECIPE)
    with pytest.raises(OptionError, match="goes with format nvfp4"):
        QuantizeRecipe("mxfp4", "nvfp4")


def test_an_unfinished_run_of_another_recipe_is_not_mixed_in(source: Path, tmp_path: Path) -> None:
    def interrupt(count: int) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", NVFP4_RECIPE, interrupt)
    with pytest.raises(CheckpointError, match="unfinished run of another source or recipe"):
        quantize_checkpoint(source, tmp_path / "out", QuantizeRecipe("mxfp4"))


def test_columns_that_are_no_blocks_are_named_before_anything_is_written(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", moe_intermediate_size=24)
    with pytest.raises(
        CheckpointError, match=r"down_proj.weight': 24 columns cannot be ModelOpt NVFP4 blocks"
    ):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", NVFP4_RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
