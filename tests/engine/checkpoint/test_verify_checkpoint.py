from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_glm import VARIANTS, make_checkpoint

from nybble.engine.checkpoint.quantize_checkpoint import quantize_checkpoint
from nybble.engine.checkpoint.quantize_recipe import QuantizeRecipe
from nybble.engine.checkpoint.verify_checkpoint import check_structure, find_bad_numbers, self_test
from nybble.engine.errors import CheckpointError


def _damage(directory: Path, name: str, value: float) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sound_checkpoint(tmp_path: Path, variant: str) -> None:
    make_checkpoint(tmp_path, **VARIANTS[variant])
    config, checkpoint = check_structure(tmp_path)
    assert list(find_bad_numbers(config, checkpoint)) == []
    assert 0 < self_test(config, checkpoint) < 0.05


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"])
def test_bad_numbers_are_named_all(tmp_path: Path, name: str, value: float) -> None:
    make_checkpoint(tmp_path)
    _damage(tmp_path, name, value)
    _damage(tmp_path, "model.embed_tokens.weight", value)
    problems = list(find_bad_numbers(*check_structure(tmp_path)))
    names = {"model.embed_tokens", name.removesuffix(".weight")}
    assert {problem.split(":")[0] for problem in problems} == names


def test_zero_and_nan_scales_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "fp4", QuantizeRecipe("nvfp4"))
    file = tmp_path / "fp4" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale"].view(torch.uint8)[0, 0] = 0
    tensors["model.layers.1.mlp.experts.4.up_proj.weight_scale"].view(torch.uint8)[0, 0] = 0x7F
    save_file(tensors, file)
    zero, nan = find_bad_numbers(*check_structure(tmp_path / "fp4"))
    assert zero == "model.layers.1.mlp.experts.3.up_proj: 1 scales are zero"
    assert "experts.4.up_proj" in nan and "NaN" in nan


def test_self_test_fails_on_weights_that_overflow(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    _damage(tmp_path, "model.layers.1.post_attention_layernorm.weight", torch.nan)
    with pytest.raises(CheckpointError, match="self-test: the first 2 layers differ by nan"):
        self_test(*check_structure(tmp_path))


def test_self_test_reads_its_layers_only(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    before = self_test(*check_structure(tmp_path))
    _damage(tmp_path, "model.layers.2.mlp.experts.0.up_proj.weight", torch.nan)
    assert self_test(*check_structure(tmp_path)) == before
