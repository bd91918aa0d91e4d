"""Under a fixed policy: what is launched does not depend on the step, and neither do a token's bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import meta_glm
import pytest
import torch
from running import random_prompt, request, run, tiny_config, tiny_engine
from tiny_glm import make_checkpoint
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.engine.checkpoint.quantize_checkpoint import quantize_checkpoint
from nybble.engine.checkpoint.quantize_recipe import QuantizeRecipe
from nybble.kernels import fp8, nvfp4
from nybble.kernels.ops import (
    AttentionBatch,
    AttentionShape,
    AttentionWeights,
    MlpWeights,
    MoeWeights,
    RmsNorm,
    RotaryAngles,
    RouterWeights,
)
from nybble.kernels.quantized_tensor import QuantizedTensor, stack
from nybble.kernels.triton.launch import recorded_launches
from nybble.kernels.triton.launch_policy import ADAPTIVE, LaunchPolicy, invariant_policy
from nybble.kernels.triton.triton_ops import TritonOps

STEPS = [(1,), (1,) * 8, (1,) * 64, (512,), (1, 1, 700, 1), (4, 4, 4), (2048,)]


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    with DEVICE:
        yield


def _kinds(arch: int, policy: LaunchPolicy, *query_lengths: int) -> list[tuple[Any, ...]]:
    """Kernels with their compile-time choices that a layer of GLM-4.7 launches, in order."""
    ops = TritonOps(torch.bfloat16, arch, policy)
    shape = meta_glm.KV_HEADS, meta_glm.HEAD_DIM, torch.bfloat16
    cache = ops.new_kv_cache(8, 64, *shape, meta_glm.META)
    batch, attention, moe = meta_glm.batch(*query_lengths), meta_glm.attention(arch), meta_glm.moe(arch)
    num_tokens = sum(query_lengths)
    hidden, update = (meta_glm.empty(num_tokens, meta_glm.HIDDEN) for _ in range(2))
    with recorded_launches() as launches:
        angles = meta_glm.angles(num_tokens)
        hidden, query = ops.attention_input(hidden, update, attention, angles, cache, batch.slots)
        update = ops.attention_output(ops.paged_attention(query, cache, batch), attention)
        hidden, update = ops.moe(hidden, update, moe)
        ops.dense_mlp(hidden, update, meta_glm.dense(arch))
    return [(launch.kernel, *sorted(_choices(launch.options))) for launch in launches]


def _choices(options: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, str(value)) for name, value in options.items()]


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_every_step_launches_the_same(arch: int) -> None:
    """But for the sorting of tokens by expert, which computes no activations."""
    policy = invariant_policy()
    kinds = [
        [kind for kind in _kinds(arch, policy, *step) if "schedule" not in kind[0].fn.__module__]
        for step in STEPS
    ]
    assert all(kind == kinds[0] for kind in kinds)
    assert len(kinds[0]) > 10


def test_else_it_does_not() -> None:
    assert _kinds(90, ADAPTIVE, 1) != _kinds(90, ADAPTIVE, 512)


HEADS = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=8)
WIDTH, EXPERTS, TOP_K = 96, 6, 2


def _matrix(kind: str, *shape: int) -> Tensor | QuantizedTensor:
    weight = torch.randn(shape) * shape[-1] ** -0.5
    return {"float": lambda w: w, "nvfp4": nvfp4.quantize, "fp8": fp8.quantize}[kind](weight)


def _stack(kind: str, *shape: int) -> Tensor | QuantizedTensor:
    parts = [_matrix(kind, *shape) for _ in range(EXPERTS)]
    quantized = [part for part in parts if isinstance(part, QuantizedTensor)]
    return stack(quantized) if quantized else torch.stack([p for p in parts if isinstance(p, Tensor)])


class Layer:
    """A sparse layer, its cache, and what goes in: one sequence."""

    def __init__(
        self,
        kind: str,
        num_tokens: int,
        dtype: torch.dtype,
        arch: int,
        policy: LaunchPolicy | None = None,
    ) -> None:
        torch.manual_seed(5)
        self.ops = ops = TritonOps(dtype, arch, policy or invariant_policy())
        experts = "nvfp4" if kind == "fp8" else kind
        norm = RmsNorm((torch.rand(WIDTH) + 0.5).to(dtype), 1e-5)
        head_norm = RmsNorm((torch.rand(16) + 0.5).to(dtype), 1e-5)
        self.attention = AttentionWeights(
            shape=HEADS,
            norm=norm,
            qkv=ops.prepare_weight(_matrix(kind, 128, WIDTH)),
            qkv_bias=torch.randn(128).to(dtype),
            query_norm=head_norm,
            key_norm=head_norm,
            output=ops.prepare_weight(_matrix(kind, WIDTH, 64)),
        )
        router = RouterWeights(torch.randn(EXPERTS, WIDTH), torch.randn(EXPERTS) / 4, TOP_K, 1, 1, True, 2.5)
        prepare = ops.prepare_weight
        self.moe = MoeWeights(
            norm=norm,
            router=ops.prepare_router(router),
            experts=MlpWeights(prepare(_stack(experts, 64, WIDTH)), prepare(_stack(experts, WIDTH, 32))),
            shared_expert=MlpWeights(prepare(_matrix(kind, 64, WIDTH)), prepare(_matrix(kind, WIDTH, 32))),
        )
        self.hidden = torch.randn(num_tokens, WIDTH).to(dtype)
        turns = torch.randn(num_tokens, 4)
        self.angles = RotaryAngles(turns.cos().to(dtype), turns.sin().to(dtype))
        self.cache = ops.new_kv_cache(num_tokens // 16 + 1, 16, 2, 16, dtype, DEVICE)

    def run(self, *chunks: int) -> Tensor:
        """Hidden states of all tokens, in steps of so many."""
        outputs, start = [], 0
        for count in chunks:
            outputs.append(self._step(start, start + count))
            start += count
        return torch.cat(outputs)

    def _step(self, start: int, stop: int) -> Tensor:
        angles = RotaryAngles(self.angles.cos[start:stop], self.angles.sin[start:stop])
        batch = AttentionBatch(
            query_starts=torch.tensor([0, stop - start], dtype=torch.int32),
            context_lengths=torch.tensor([stop], dtype=torch.int32),
            block_tables=torch.arange(len(self.cache.keys), dtype=torch.int32).unsqueeze(0),
            slots=torch.arange(start, stop),
            query_lengths=(stop - start,),
        )
        hidden, update = self.hidden[start:stop].clone(), None
        hidden, query = self.ops.attention_input(
            hidden, update, self.attention, angles, self.cache, batch.slots
        )
        attended = self.ops.paged_attention(query, self.cache, batch)
        update = self.ops.attention_output(attended, self.attention)
        hidden, update = self.ops.moe(hidden, update, self.moe)
        return hidden + update


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("nvfp4", torch.bfloat16),
        ("fp8", torch.bfloat16),
        ("float", torch.bfloat16),
        ("float", torch.float32),
    ],
    ids=str,
)
def test_a_tokens_bits_are_the_same_in_every_chunk(kind: str, dtype: torch.dtype) -> None:
    layer = Layer(kind, 20, dtype, ARCHES[-1])
    assert torch.equal(layer.run(1, 2, 17), layer.run(20))


def test_else_they_are_not() -> None:
    layer = Layer("nvfp4", 20, torch.float32, ARCHES[-1], ADAPTIVE)
    assert not torch.equal(layer.run(1, 2, 17), layer.run(20))


def test_an_engine_gives_the_same_tokens_alone_and_beside_others(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "floats", num_hidden_layers=2, n_routed_experts=4, max_position_embeddings=64)
    quantize_checkpoint(tmp_path / "floats", tmp_path / "fp4", QuantizeRecipe("nvfp4"))
    config = tiny_config(tmp_path / "fp4", max_num_batched_tokens=12, max_num_seqs=4)
    config = replace(config, device=DEVICE.type, dtype="float32", backend="triton", deterministic=True)
    asked = [request(str(n), random_prompt(n, n), max_tokens=2, num_logprobs=1) for n in (14, 3)]
    together = run(tiny_engine(config), *asked)
    for item in asked:
        alone = run(tiny_engine(config), item)[item.request_id]
        found = together[item.request_id]
        assert [(e.token_id, e.logprobs) for e in alone] == [(e.token_id, e.logprobs) for e in found]
