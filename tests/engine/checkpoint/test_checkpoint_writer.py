from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.checkpoint_writer import CheckpointWriter
from nybble.engine.checkpoint.layouts import MODELOPT_NVFP4
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.parameters import expected_parameters
from nybble.engine.errors import CheckpointError
from nybble.engine.model.weights import load_weights
from nybble.kernels import nvfp4
from nybble.kernels.ops import MoeWeights
from nybble.kernels.quantized_tensor import QuantizedTensor, concatenate_rows
from nybble.kernels.reference_ops import ReferenceOps

GLM_4_7: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "glm-4.7-config.json").read_text())
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "eos_token_id": 0,
}
KIB = torch.zeros(256)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _write(directory: Path) -> None:
    with CheckpointWriter(directory) as writer:
        writer.add("a", KIB)
        writer.write_json("config.json", {"é": 1})


def _contents(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Files.


def test_shards_are_numbered_and_indexed(tmp_path: Path) -> None:
    tensors = {name: KIB + ord(name) for name in "abcde"}
    with CheckpointWriter(tmp_path / "glm", shard_bytes=2048) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert _contents(tmp_path) == ["glm"]
    assert _contents(tmp_path / "glm") == [*shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "glm" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 1024
    assert index["weight_map"] == dict(
        zip("abcde", [shards[0]] * 2 + [shards[1]] * 2 + [shards[2]], strict=True)
    )
    checkpoint = Checkpoint.open(tmp_path / "glm")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    """A server often runs as another user than the one who prepared its checkpoint."""
    before = os.umask(0o027)
    try:
        with CheckpointWriter(tmp_path / "c") as writer:
            writer.add("a", torch.zeros(2))
            writer.write_json("config.json", {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "c").iterdir()} == {0o640}


def test_metadata_goes_into_the_index_and_the_files(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "glm", {"recipe": 3}) as writer:
        writer.add("a", KIB)
    index = json.loads((tmp_path / "glm" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 1024, "recipe": 3}
    with safe_open(tmp_path / "glm" / "model-00001-of-00001.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # without which transformers refuses it


def test_texts_are_utf_8(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "glm") as writer:
        writer.write_json("config.json", {"é": [1, None]})
        writer.write_text("NOTICE", "día\n")
    assert json.loads((tmp_path / "glm" / "config.json").read_bytes().decode()) == {"é": [1, None]}
    assert (tmp_path / "glm" / "NOTICE").read_bytes() == b"d\xc3\xada\n"


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    matrix = _random(6, 4)
    with CheckpointWriter(tmp_path / "glm") as writer:
        writer.add("transposed", matrix.T)
        writer.add("rows", matrix[2:4])
        writer.add("column", matrix[:, 1])
    checkpoint = Checkpoint.open(tmp_path / "glm")
    assert torch.equal(checkpoint.read("transposed"), matrix.T)
    assert torch.equal(checkpoint.read("rows"), matrix[2:4])
    assert torch.equal(checkpoint.read("column"), matrix[:, 1])


# NVFP4.


def test_nvfp4_is_written_byte_for_byte(tmp_path: Path) -> None:
    weight = nvfp4.quantize(_random(3, 32))
    with CheckpointWriter(tmp_path / "glm") as writer:
        writer.add_matrix("m.up_proj", weight, MODELOPT_NVFP4)
    checkpoint = Checkpoint.open(tmp_path / "glm")
    names = ["m.up_proj.weight", "m.up_proj.weight_scale", "m.up_proj.weight_scale_2"]
    assert set(checkpoint.entries) == set(names)
    codes, block_scales, scale = (checkpoint.read(name) for name in names)
    assert torch.equal(codes, weight.codes)
    assert block_scales.dtype == torch.float8_e4m3fn
    assert torch.equal(block_scales.view(torch.uint8), weight.block_scales.view(torch.uint8))
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, ())
    assert scale == weight.global_scales[0]
    assert [checkpoint.entries[name].dtype for name in names] == ["U8", "F8_E4M3", "F32"]


def test_rows_with_different_global_scales_are_refused(tmp_path: Path) -> None:
    mixed = concatenate_rows([nvfp4.quantize(_random(1, 16) * factor) for factor in (1, 9)])
    with CheckpointWriter(tmp_path / "glm") as writer:
        with pytest.raises(ValueError, match="m: rows of one matrix have different global scales"):
            writer.add_matrix("m", mixed, MODELOPT_NVFP4)
        writer.add("a", KIB)
    assert list(Checkpoint.open(tmp_path / "glm").entries) == ["a"]


def _config() -> ModelConfig:
    return ModelConfig.from_fields(GLM_4_7 | TINY)


def _write_model(directory: Path) -> dict[str, Tensor]:
    """Every parameter random, MLPs in NVFP4; returns what they stand for."""
    weights: dict[str, Tensor] = {}
    with CheckpointWriter(directory, shard_bytes=10_000) as writer:
        for seed, parameter in enumerate(expected_parameters(_config())):
            name, tensor = parameter.name, _random(*parameter.shape, seed=seed)
            if parameter.is_linear and ".mlp." in name:
                quantized = nvfp4.quantize(tensor)
                writer.add_matrix(name.removesuffix(".weight"), quantized, MODELOPT_NVFP4)
                weights[name] = quantized.dequantize()
            else:
                writer.add(name, tensor.bfloat16())
                weights[name] = tensor.bfloat16().float()
    return weights


def test_a_model_comes_back_through_the_loader(tmp_path: Path) -> None:
    expected = _write_model(tmp_path / "glm")
    loaded_layers: list[int] = []
    model = load_weights(
        Checkpoint.open(tmp_path / "glm"),
        _config(),
        ReferenceOps(torch.float32),
        torch.device("cpu"),
        torch.float32,
        on_layer=loaded_layers.append,
    )
    assert loaded_layers == [0, 1]
    dense, sparse = model.layers
    assert model.embedding is not None and model.head is not None
    assert torch.equal(model.embedding.table, expected["model.embed_tokens.weight"])
    assert torch.equal(model.head.matrix, expected["lm_head.weight"])
    assert torch.equal(model.head.norm.weight, expected["model.norm.weight"])
    attention = "model.layers.1.self_attn"
    for kind, joined in (("weight", sparse.attention.qkv), ("bias", sparse.attention.qkv_bias)):
        parts = torch.cat([expected[f"{attention}.{name}_proj.{kind}"] for name in "qkv"])
        assert joined is not None
        assert torch.equal(joined, parts)
    assert torch.equal(sparse.attention.output, expected[f"{attention}.o_proj.weight"])
    for name, norm in (("q_norm", sparse.attention.query_norm), ("k_norm", sparse.attention.key_norm)):
        assert norm is not None
        assert torch.equal(norm.weight, expected[f"{attention}.{name}.weight"])
    _assert_mlp(dense.feed_forward.mlp, expected, "model.layers.0.mlp")  # type: ignore[union-attr]
    assert isinstance(sparse.feed_forward, MoeWeights)
    _assert_mlp(sparse.feed_forward.shared_expert, expected, "model.layers.1.mlp.shared_experts")
    stacks = sparse.feed_forward.experts
    for expert in range(4):
        one = type(stacks)(stacks.gate_up[expert], stacks.down[expert])
        _assert_mlp(one, expected, f"model.layers.1.mlp.experts.{expert}")
    router = sparse.feed_forward.router
    assert torch.equal(router.weight, expected["model.layers.1.mlp.gate.weight"])
    assert torch.equal(router.bias, expected["model.layers.1.mlp.gate.e_score_correction_bias"])


def _assert_mlp(mlp: Any, expected: dict[str, Tensor], name: str) -> None:
    gate_up = torch.cat([expected[f"{name}.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(mlp.gate_up, gate_up)
    assert torch.equal(mlp.down, expected[f"{name}.down_proj.weight"])


# Interruption.


def test_an_exception_leaves_nothing_and_the_next_run_succeeds(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "glm", shard_bytes=1024) as writer:
        writer.add("a", KIB)
        writer.add("b", KIB)
        assert len(_contents(tmp_path)) == 1
        raise KeyboardInterrupt
    assert _contents(tmp_path) == []
    _write(tmp_path / "glm")
    assert list(Checkpoint.open(tmp_path / "glm").entries) == ["a"]


_KILLED = """
import os, sys, torch
from pathlib import Path
from nybble.engine.checkpoint.checkpoint_writer import CheckpointWriter

with CheckpointWriter(Path(sys.argv[1]), shard_bytes=1024) as writer:
    writer.add("stale", torch.zeros(256))
    writer.write_text("stale.txt", "")
    os._exit(9)
"""


def test_a_killed_run_leaves_no_checkpoint_and_the_next_run_succeeds(tmp_path: Path) -> None:
    directory = tmp_path / "glm"
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(directory)], timeout=60)
    assert killed.returncode == 9
    assert not directory.exists()
    [partial] = tmp_path.iterdir()
    assert partial.name.startswith(".")
    assert len(_contents(partial)) == 2
    _write(directory)
    assert _contents(tmp_path) == ["glm"]
    assert not [name for name in _contents(directory) if "stale" in name]
    assert list(Checkpoint.open(directory).entries) == ["a"]


def test_it_is_not_visible_before_it_is_complete(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "glm", shard_bytes=1024) as writer:
        writer.add("a", KIB)
        assert not (tmp_path / "glm").exists()
    assert (tmp_path / "glm").exists()


def test_an_existing_directory_is_never_touched(tmp_path: Path) -> None:
    _write(tmp_path / "glm")
    before = {path.name: path.read_bytes() for path in (tmp_path / "glm").iterdir()}
    with pytest.raises(CheckpointError, match="glm: exists already"), CheckpointWriter(tmp_path / "glm"):
        pytest.fail("it was entered")
    assert {path.name: path.read_bytes() for path in (tmp_path / "glm").iterdir()} == before
    assert _contents(tmp_path) == ["glm"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" / "glm"
    with pytest.raises(CheckpointError, match="glm: cannot be written"), CheckpointWriter(directory):
        pytest.fail("it was entered")


def test_parents_are_made(tmp_path: Path) -> None:
    _write(tmp_path / "a" / "b" / "glm")
    assert list(Checkpoint.open(tmp_path / "a" / "b" / "glm").entries) == ["a"]


def test_a_quantized_weight_is_not_changed_by_writing(tmp_path: Path) -> None:
    weight = nvfp4.quantize(_random(3, 32))
    copy = QuantizedTensor(
        weight.codes.clone(), weight.block_scales.clone(), weight.global_scales.clone(), weight.format
    )
    with CheckpointWriter(tmp_path / "glm") as writer:
        writer.add_matrix("m", weight, MODELOPT_NVFP4)
    assert torch.equal(weight.dequantize(), copy.dequantize())


def test_a_name_added_twice_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a' is added twice"), CheckpointWriter(tmp_path / "x") as writer:
        writer.add("a", torch.zeros(1))
        writer.add("a", torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_is_written_as_it_was_when_added_even_under_two_names(tmp_path: Path) -> None:
    tensor = torch.zeros(4)
    with CheckpointWriter(tmp_path / "x") as writer:
        writer.add("a", tensor)
        writer.add("b", tensor)
        tensor.fill_(1)
    checkpoint = Checkpoint.open(tmp_path / "x")
    assert checkpoint.read("a").tolist() == checkpoint.read("b").tolist() == [0] * 4


def test_two_writers_in_one_place_do_not_harm_each_other(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "x") as writer:
        writer.add("a", torch.zeros(1))
        with (
            pytest.raises(CheckpointError, match="another process is writing"),
            CheckpointWriter(tmp_path / "x"),
        ):
            pass
    assert list(Checkpoint.open(tmp_path / "x").entries) == ["a"]


def test_a_dangling_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="x: exists already"), CheckpointWriter(tmp_path / "x"):
        pass
