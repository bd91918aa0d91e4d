"""`TritonOps` as a whole: what it launches, and that it serves a model as the reference does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import meta_glm
import pytest
import torch
from closeness import assert_close
from running import random_prompt, request, run, tiny_config, tiny_engine, tokens
from tiny_glm import make_checkpoint, make_predictable
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.engine.checkpoint.quantize_checkpoint import quantize_checkpoint
from nybble.engine.checkpoint.quantize_recipe import QuantizeRecipe
from nybble.engine.checkpoint.weight_dtypes import WeightDtypes
from nybble.engine.engine_config import SpeculationConfig
from nybble.kernels import nvfp4
from nybble.kernels.ops import MlpWeights, MoeWeights, Ops, RmsNorm, RouterWeights
from nybble.kernels.quantized_tensor import QuantizedTensor, stack
from nybble.kernels.reference_ops import ReferenceOps
from nybble.kernels.triton.activation_order import from_fragment_order
from nybble.kernels.triton.launch import KernelLaunch, recorded_launches
from nybble.kernels.triton.matmul import Matrix
from nybble.kernels.triton.triton_ops import TritonOps


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    with DEVICE:
        yield


def launches_of_a_layer(arch: int, *query_lengths: int, weights: MoeWeights[Matrix]) -> list[KernelLaunch]:
    """What a sparse layer of GLM-4.7 launches, between two layers."""
    ops = TritonOps(torch.bfloat16, arch)
    cache = ops.new_kv_cache(8, 64, meta_glm.KV_HEADS, meta_glm.HEAD_DIM, torch.bfloat16, meta_glm.META)
    batch, attention = meta_glm.batch(*query_lengths), meta_glm.attention(arch)
    num_tokens = sum(query_lengths)
    hidden, update = (meta_glm.empty(num_tokens, meta_glm.HIDDEN) for _ in range(2))
    with recorded_launches() as launches:
        angles = meta_glm.angles(num_tokens)
        hidden, query = ops.attention_input(hidden, update, attention, angles, cache, batch.slots)
        update = ops.attention_output(ops.paged_attention(query, cache, batch), attention)
        hidden, update = ops.moe(hidden, update, weights)
    assert hidden.shape == update.shape == (num_tokens, meta_glm.HIDDEN)
    return launches


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("num_sequences", [1, 2, 8])
def test_a_decode_step_launches_eleven_kernels_a_layer(num_sequences: int, arch: int) -> None:
    """And waits for nothing: tensors here have no data."""
    launches = launches_of_a_layer(arch, *[1] * num_sequences, weights=meta_glm.moe(arch))
    assert len(launches) <= 11, Counter(launch.kernel.__name__ for launch in launches)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("query_lengths", [(1,) * 64, (512,), (1, 1, 700, 1), (4, 4, 4), (8192,)])
def test_no_step_waits_for_the_device(query_lengths: tuple[int, ...], arch: int) -> None:
    assert launches_of_a_layer(arch, *query_lengths, weights=meta_glm.moe(arch))


def test_a_shared_expert_of_another_shape_has_launches_of_its_own() -> None:
    riding = launches_of_a_layer(90, 1, weights=meta_glm.moe(90))
    alone = launches_of_a_layer(90, 1, weights=meta_glm.without_shared_form(meta_glm.moe(90), 90))
    assert len(alone) == len(riding) + 3


def quantized(*shape: int) -> QuantizedTensor:
    """NVFP4 weights that keep activations near 1."""
    if len(shape) > 2:
        return stack([quantized(*shape[1:]) for _ in range(shape[0])])
    return nvfp4.quantize(torch.randn(shape) * shape[-1] ** -0.5)


def moe_weights(num_experts: int, shared_neurons: int) -> MoeWeights[Tensor | QuantizedTensor]:
    return MoeWeights(
        norm=RmsNorm(torch.rand(96) + 0.5, 1e-5),
        router=RouterWeights(torch.randn(num_experts, 96), torch.randn(num_experts) / 4, 3, 1, 1, True, 2.5),
        experts=MlpWeights(quantized(num_experts, 64, 96), quantized(num_experts, 96, 32)),
        shared_expert=MlpWeights(quantized(2 * shared_neurons, 96), quantized(96, shared_neurons)),
    )


def prepared(ops: Ops[Any], weights: MoeWeights[Tensor | QuantizedTensor]) -> MoeWeights[Any]:
    def mlp(parts: MlpWeights[Tensor | QuantizedTensor]) -> MlpWeights[Any]:
        return MlpWeights(ops.prepare_weight(parts.gate_up), ops.prepare_weight(parts.down))

    return MoeWeights(
        norm=weights.norm,
        router=ops.prepare_router(weights.router),
        experts=mlp(weights.experts),
        shared_expert=mlp(weights.shared_expert),
        first_expert=weights.first_expert,
    )


@pytest.mark.parametrize("arch", [arch for arch in (90, 100) if arch in ARCHES] or ARCHES)
@pytest.mark.parametrize(("num_tokens", "shared_neurons"), [(1, 32), (2, 64), (9, 32)])
def test_moe_is_the_references(num_tokens: int, shared_neurons: int, arch: int) -> None:
    """Few tokens and many, with a shared expert that rides with the others and one that does not."""
    torch.manual_seed(num_tokens)
    weights = moe_weights(7, shared_neurons)
    hidden, update = torch.randn(num_tokens, 96), torch.randn(num_tokens, 96)
    reference, ops = ReferenceOps(torch.float32), TritonOps(torch.float32, arch)
    wanted_hidden, wanted = reference.moe(hidden, update, prepared(reference, weights))
    actual_hidden, actual = ops.moe(hidden.clone(), update, prepared(ops, weights))
    assert torch.equal(actual_hidden, wanted_hidden)
    assert_close(actual, wanted, max_error=1e-4, rms_error=1e-5)


def test_moes_of_the_ranks_add_up() -> None:
    torch.manual_seed(0)
    weights, hidden, ops = moe_weights(6, 32), torch.randn(9, 96), TritonOps(torch.float32, 90)
    _, whole = ops.moe(hidden.clone(), None, prepared(ops, weights))
    for num_tokens in (9, 1):
        total = torch.zeros(num_tokens, 96)
        for first in (0, 3):
            held = slice(first, first + 3)
            experts = MlpWeights(
                *(part_of(part, held) for part in (weights.experts.gate_up, weights.experts.down))
            )
            share = replace(weights, experts=experts, first_expert=first)
            if first:
                share = replace(share, shared_expert=silenced(share.shared_expert))
            total += ops.moe(hidden[:num_tokens].clone(), None, prepared(ops, share))[1]
        assert_close(total, whole[:num_tokens], max_error=1e-4, rms_error=1e-5)


def part_of(weight: Tensor | QuantizedTensor, held: slice) -> QuantizedTensor:
    assert isinstance(weight, QuantizedTensor)
    return stack([weight[index] for index in range(*held.indices(len(weight.codes)))])


def silenced(weights: MlpWeights[Tensor | QuantizedTensor]) -> MlpWeights[Tensor | QuantizedTensor]:
    """A shared expert that adds nothing."""
    assert isinstance(weights.down, QuantizedTensor)
    return replace(weights, down=replace(weights.down, codes=torch.zeros_like(weights.down.codes)))


def test_plain_experts_are_the_references() -> None:
    torch.manual_seed(1)
    weights = moe_weights(5, 32)
    plain = replace(
        weights,
        experts=MlpWeights(*(w.dequantize() for w in (weights.experts.gate_up, weights.experts.down))),
    )
    hidden, reference, ops = torch.randn(6, 96), ReferenceOps(torch.float32), TritonOps(torch.float32, 90)
    _, wanted = reference.moe(hidden, None, prepared(reference, plain))
    _, actual = ops.moe(hidden.clone(), None, prepared(ops, plain))
    assert_close(actual, wanted, max_error=1e-4, rms_error=1e-5)


@pytest.mark.parametrize("width", [96, 128])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_norm_and_linear_are_the_references(width: int, is_quantized: bool) -> None:
    torch.manual_seed(2)
    weight: Tensor | QuantizedTensor = torch.randn(40, width) * width**-0.5
    if is_quantized:
        weight = quantized(40, width)
    x, norm = torch.randn(5, width), RmsNorm(torch.rand(width) + 0.5, 1e-5)
    reference, ops = ReferenceOps(torch.float32), TritonOps(torch.float32, 90)
    normed = ops.rms_norm(x, norm)
    assert_close(normed, reference.rms_norm(x, norm), max_error=1e-5, rms_error=1e-6)
    wanted = reference.linear(normed, reference.prepare_weight(weight))
    assert_close(ops.linear(normed, ops.prepare_weight(weight)), wanted, max_error=1e-4, rms_error=1e-5)


def test_attention_output_takes_what_attention_gives() -> None:
    """In fragment order, padded: 3 heads of 16 are not whole blocks of 64."""
    ops = TritonOps(torch.float32, 90)
    cache = ops.new_kv_cache(4, 16, 1, 16, torch.float32, DEVICE)
    cache.keys.normal_(), cache.values.normal_()
    query = torch.randn(3, 3, 16, device=DEVICE)
    batch = replace(
        meta_glm.batch(1, 1, 1, max_blocks=2),
        query_starts=torch.arange(4, dtype=torch.int32, device=DEVICE),
        context_lengths=torch.tensor([5, 17, 32], dtype=torch.int32, device=DEVICE),
        block_tables=torch.tensor([[1, 0], [2, 3], [3, 1]], dtype=torch.int32, device=DEVICE),
    )
    attended = from_fragment_order(ops.paged_attention(query, cache, batch))
    assert attended.shape == (3, 64) and not attended[:, 48:].any()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("triton")
    make_checkpoint(root / "floats", num_hidden_layers=2, n_routed_experts=4, max_position_embeddings=64)
    recipes = {
        "nvfp4": QuantizeRecipe("nvfp4"),
        "mxfp4-fp8": QuantizeRecipe("mxfp4", "fp8"),
    }
    for name, recipe in recipes.items():
        quantize_checkpoint(root / "floats", root / name, recipe)
    return {name: root / name for name in recipes}


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4-fp8"])
def test_the_engine_serves_the_references_tokens(checkpoints: dict[str, Path], name: str) -> None:
    """Prefill in chunks, decode beside prefill, and requests that end at different times."""
    config = tiny_config(checkpoints[name], max_num_batched_tokens=12, max_num_seqs=4)
    config = replace(config, device=DEVICE.type, dtype="float32")
    requests = [request(f"r{n}", random_prompt(n, n), max_tokens=n % 4 + 1) for n in (1, 14)]
    answers = []
    for backend in ("reference", "triton"):
        events = run(tiny_engine(replace(config, backend=backend)), *requests)
        answers.append({name: tokens(listed) for name, listed in events.items()})
    assert answers[0] == answers[1]


def test_the_engine_serves_the_references_tokens_from_an_fp8_cache(checkpoints: dict[str, Path]) -> None:
    config = tiny_config(checkpoints["nvfp4"], max_num_batched_tokens=12, max_num_seqs=4)
    cache = replace(config.cache, kv_cache_dtype="fp8")
    config = replace(config, device=DEVICE.type, dtype="float32", cache=cache)
    asked = request("a", random_prompt(14, 14), max_tokens=4)
    reference, triton = (
        tokens(run(tiny_engine(replace(config, backend=backend)), asked)["a"])
        for backend in ("reference", "triton")
    )
    assert reference == triton


@pytest.mark.parametrize("dtype", ["stored", "nvfp4"])
def test_drafts_on_triton_change_no_token(tmp_path: Path, dtype: Literal["stored", "nvfp4"]) -> None:
    """Several query tokens a sequence, and the draft layer with experts that have no kernel, or have."""
    sizes = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 4}
    make_checkpoint(tmp_path / "floats", num_mtp_layers=1, **sizes, max_position_embeddings=64)
    make_predictable(tmp_path / "floats")
    quantize_checkpoint(tmp_path / "floats", tmp_path / "nvfp4", QuantizeRecipe("nvfp4"))
    config = tiny_config(tmp_path / "nvfp4", max_num_batched_tokens=12, max_num_seqs=4)
    config = replace(config, device=DEVICE.type, dtype="float32")
    requests = [request(f"r{n}", random_prompt(n, n), max_tokens=5) for n in (1, 14)]
    plain = run(tiny_engine(replace(config, backend="reference")), *requests)
    speculation = SpeculationConfig(num_speculative_tokens=2)
    weights = WeightDtypes(draft_expert_dtype=dtype)
    engine = tiny_engine(replace(config, backend="triton", speculation=speculation, weights=weights))
    drafted = run(engine, *requests)
    assert {n: tokens(listed) for n, listed in drafted.items()} == {n: tokens(e) for n, e in plain.items()}
    stats = engine.stats().speculation
    assert stats is not None and sum(stats.num_accepted) > 0
