from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import random_prompt, request, run, tiny_config, tiny_engine, tokens
from tiny_glm import make_checkpoint

from nybble.engine.checkpoint.quantize_checkpoint import quantize_checkpoint
from nybble.engine.checkpoint.quantize_recipe import QuantizeRecipe
from nybble.engine.checkpoint.weight_dtypes import WeightDtypes, recast
from nybble.engine.engine_config import EngineConfig
from nybble.kernels import fp8, mxfp4, nvfp4
from nybble.kernels.quantized_tensor import FP8, NVFP4, QuantizedTensor

WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_stored_is_not_touched() -> None:
    assert recast(WEIGHT, "stored") is WEIGHT
    quantized = mxfp4.quantize(WEIGHT)
    assert recast(quantized, "stored") is quantized


@pytest.mark.parametrize("dtype", ["fp8", "nvfp4"])
def test_what_has_the_form_is_not_quantized_again(dtype: str) -> None:
    quantized = {"fp8": fp8, "nvfp4": nvfp4}[dtype].quantize(WEIGHT)
    assert recast(quantized, dtype) is quantized  # type: ignore[arg-type]
    assert recast(WEIGHT, "bf16") is WEIGHT


def test_floats_become_quantized_and_back() -> None:
    for dtype, form in (("fp8", FP8), ("nvfp4", NVFP4)):
        quantized = recast(WEIGHT, dtype)  # type: ignore[arg-type]
        assert isinstance(quantized, QuantizedTensor) and quantized.format is form
        back = recast(quantized, "bf16")
        assert isinstance(back, torch.Tensor) and torch.equal(back, quantized.dequantize(torch.bfloat16))


def _tokens(config: EngineConfig) -> list[int]:
    return tokens(run(tiny_engine(config), request("a", random_prompt(30, seed=1), 40))["a"])


def test_attention_at_load_equals_attention_in_the_checkpoint(tmp_path: Path) -> None:
    """The same numbers, whether `nybble quantize` or the loader makes them."""
    make_checkpoint(tmp_path / "source", seed=31)
    quantize_checkpoint(tmp_path / "source", tmp_path / "bf16", QuantizeRecipe("nvfp4"))
    quantize_checkpoint(tmp_path / "source", tmp_path / "fp8", QuantizeRecipe("nvfp4", "fp8"))
    dtypes = WeightDtypes(attention_dtype="fp8")
    at_load = _tokens(replace(tiny_config(tmp_path / "bf16"), weights=dtypes))
    assert at_load == _tokens(tiny_config(tmp_path / "fp8"))
    assert at_load != _tokens(tiny_config(tmp_path / "bf16"))


@pytest.mark.parametrize("field", ["dense_mlp_dtype", "shared_expert_dtype", "attention_dtype"])
def test_each_option_changes_its_own_matrices(tmp_path: Path, field: str) -> None:
    make_checkpoint(tmp_path, seed=32)
    config = tiny_config(tmp_path)
    changed = replace(config, weights=WeightDtypes(**{field: "nvfp4"}))
    assert _tokens(changed) != _tokens(config)
