from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from closeness import assert_close
from cpu_weights import (
    FP4_FORMATS,
    as_words,
    every_kind,
    generator_of,
    random_float,
    random_fp4,
    random_fp8,
    random_stack,
    takes_floats,
)
from guarded_memory import guarded as guarded
from torch import Tensor

from nybble.kernels.cpu.cpu_matrix import CpuMatrix, dequantize, prepare
from nybble.kernels.cpu.cpu_router import prepare_router
from nybble.kernels.cpu.feed_forward import FeedForward
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.ops import DenseWeights, MlpWeights, MoeWeights, RmsNorm, RouterWeights
from nybble.kernels.quantized_tensor import NVFP4, Format, QuantizedTensor, stack
from nybble.kernels.reference_ops import ReferenceOps, added, experts, mlp, rms_norm, route

REFERENCE = ReferenceOps(torch.float32)
# Of the numbers that int8 stands for; a sum of another order may round one of them to its neighbour.
WORDS = {"max_error": 5e-3, "rms_error": 1e-3}
FLOATS = {"max_error": 1e-4, "rms_error": 1e-5}


@dataclass(frozen=True)
class Shape:
    width: int = 80
    neurons: int = 48
    shared_neurons: int = 96
    num_experts: int = 8
    top_k: int = 3
    num_groups: int = 1
    top_k_groups: int = 1


SHAPES = (
    Shape(),
    Shape(width=16, neurons=16, shared_neurons=16, num_experts=2, top_k=1),
    Shape(width=576, neurons=96, shared_neurons=768, num_experts=16, top_k=8),
    Shape(num_experts=40, top_k=5, num_groups=5, top_k_groups=2),
    Shape(top_k=8),
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator_of(seed, *shape))


def norm_of(width: int) -> RmsNorm:
    return RmsNorm(1 + 0.3 * normal(width), 1e-5)


def router_of(shape: Shape) -> RouterWeights:
    weight = normal(shape.num_experts, shape.width) / shape.width**0.5
    bias = 0.1 * normal(shape.num_experts)
    return RouterWeights(weight, bias, shape.top_k, shape.num_groups, shape.top_k_groups, True, 2.5)


def sparse(
    shape: Shape, format: Format = NVFP4, first: int = 0, end: int | None = None
) -> MoeWeights[CpuMatrix]:
    """Experts first .. end - 1 of those that a router knows."""
    held = slice(first, end)
    experts = (
        random_stack(format, shape.num_experts, 2 * shape.neurons, shape.width, 1),
        random_stack(format, shape.num_experts, shape.width, shape.neurons, 2),
    )
    return MoeWeights(
        norm_of(shape.width),
        router_of(shape),
        MlpWeights(*(prepare(held_experts(stack, held)) for stack in experts)),
        MlpWeights(
            prepare(random_fp4(format, 2 * shape.shared_neurons, shape.width)),
            prepare(random_fp4(format, shape.width, shape.shared_neurons)),
        ),
        first,
    )


def held_experts(stack: QuantizedTensor, held: slice) -> QuantizedTensor:
    scales = stack.global_scales
    assert stack.block_scales is not None
    return QuantizedTensor(
        stack.codes[held], stack.block_scales[held], None if scales is None else scales[held], stack.format
    )


def dequantized(mlp: MlpWeights[CpuMatrix]) -> MlpWeights[Tensor]:
    return MlpWeights(dequantize(mlp.gate_up), dequantize(mlp.down))


def reference_of(weights: MoeWeights[CpuMatrix]) -> MoeWeights[Tensor]:
    return MoeWeights(
        weights.norm,
        weights.router,
        dequantized(weights.experts),
        dequantized(weights.shared_expert),
        weights.first_expert,
    )


def run(
    pool: Pool, hidden: Tensor, update: Tensor | None, weights: MoeWeights[CpuMatrix]
) -> tuple[Tensor, Tensor]:
    prepared = replace(weights, router=prepare_router(weights.router))
    return FeedForward(pool).moe(hidden.clone(), update, prepared)


def as_taken(x: Tensor, gate_up: CpuMatrix) -> Tensor:
    """What gate and up are multiplied with. What `down` takes is as good as the numbers themselves."""
    return x if takes_floats(gate_up) else as_words(x).float()


def dense_of_words(hidden: Tensor, weights: DenseWeights[CpuMatrix]) -> Tensor:
    x = as_taken(rms_norm(hidden, weights.norm), weights.mlp.gate_up)
    return mlp(x, dequantized(weights.mlp))


def sparse_of_words(hidden: Tensor, weights: MoeWeights[CpuMatrix]) -> Tensor:
    x = rms_norm(hidden, weights.norm)
    routing = route(x, weights.router)
    taken = as_taken(x, weights.experts.gate_up)
    routed = experts(taken, routing, dequantized(weights.experts), weights.first_expert)
    return routed + mlp(as_taken(x, weights.shared_expert.gate_up), dequantized(weights.shared_expert))


def check(pool: Pool, hidden: Tensor, update: Tensor | None, weights: MoeWeights[CpuMatrix]) -> None:
    summed, out = run(pool, hidden, update, weights)
    assert torch.equal(summed, added(hidden, update))
    assert_close(out, sparse_of_words(summed, weights), **WORDS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(pool: Pool, shape: Shape, guarded: None) -> None:
    weights = sparse(shape)
    for num_tokens in (1, 8, 9, 21):
        hidden, update = normal(2, num_tokens, shape.width)
        check(pool, hidden, update, weights)


@pytest.mark.parametrize("format", FP4_FORMATS, ids=lambda format: format.name)
def test_formats(pool: Pool, format: Format) -> None:
    shape = Shape(width=96, neurons=64)
    check(pool, normal(5, shape.width), None, sparse(shape, format))


def test_neurons_that_share_tiles(pool: Pool) -> None:
    """A width of the MLP that is no multiple of 16: rows of gate and up stand in one tile."""
    weights = MlpWeights(prepare(random_float(2 * 39, 50), "bf16"), prepare(random_float(50, 39), "bf16"))
    layer, hidden = DenseWeights(norm_of(50), weights), normal(11, 50)
    _, out = FeedForward(pool).dense_mlp(hidden.clone(), None, layer)
    _, expected = REFERENCE.dense_mlp(hidden, None, DenseWeights(layer.norm, dequantized(weights)))
    assert_close(out, expected, **FLOATS)


def experts_of_floats(kind: str) -> MlpWeights[CpuMatrix]:
    if kind == "bf16":
        return MlpWeights(
            prepare(normal(12, 2 * 48, 80) / 9, "bf16"), prepare(normal(12, 80, 48) / 7, "bf16")
        )
    gate_up, down = ([random_fp8(*size, seed) for seed in range(12)] for size in ((2 * 48, 80), (80, 48)))
    return MlpWeights(prepare(stack(gate_up)), prepare(stack(down)))


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_experts_of_floats_beside_a_shared_expert_of_int8(pool: Pool, kind: str) -> None:
    """Only int8 rounds; routing and the order of sums are seen to 1e-5."""
    shape = Shape(num_experts=12, top_k=4)
    weights = replace(sparse(shape), experts=experts_of_floats(kind))
    check(pool, normal(21, 80), None, weights)
    silent = MlpWeights(prepare(torch.zeros(2 * 96, 80)), prepare(torch.zeros(80, 96)))
    weights = replace(weights, shared_expert=silent)
    _, out = run(pool, normal(21, 80), None, weights)
    _, expected = REFERENCE.moe(normal(21, 80), None, reference_of(weights))
    assert_close(out, expected, **FLOATS)


@pytest.mark.parametrize("num_tokens", [1, 8, 40])
def test_all_tokens_to_the_same_experts(pool: Pool, num_tokens: int) -> None:
    weights = sparse(Shape())
    bias = torch.tensor([0.0, 9, 0, 0, 0, 9, 0, 9])
    check(pool, normal(num_tokens, 80), None, replace(weights, router=replace(weights.router, bias=bias)))


@pytest.mark.parametrize("normalize", [False, True])
def test_weights_of_experts(pool: Pool, normalize: bool) -> None:
    weights = sparse(Shape())
    router = replace(weights.router, normalize=normalize, scale=0.7)
    check(pool, normal(9, 80), None, replace(weights, router=router))


@pytest.mark.parametrize(("first", "end"), [(0, 3), (2, 5), (7, 8)])
def test_expert_parallel_share(pool: Pool, first: int, end: int) -> None:
    """Tokens whose experts are elsewhere have the shared expert only."""
    check(pool, normal(19, 80), normal(19, 80, seed=1), sparse(Shape(top_k=2), first=first, end=end))


def test_a_row_does_not_depend_on_others_or_on_threads(pool: Pool) -> None:
    shape = Shape(width=576, neurons=96, num_experts=16, top_k=4)
    weights, hidden = sparse(shape), normal(43, 576)
    _, together = run(pool, hidden, None, weights)
    for first, after in ((0, 1), (1, 4), (4, 13), (13, 43)):
        assert torch.equal(run(pool, hidden[first:after], None, weights)[1], together[first:after])
    with Pool(1, pool.level) as one_thread:
        assert torch.equal(run(one_thread, hidden, None, weights)[1], together)


def with_outliers(*shape: int) -> Tensor:
    """One number in a hundred is of another size."""
    is_large = torch.rand(shape, generator=generator_of(7, *shape)) < 0.01
    return normal(*shape) * torch.where(is_large, 20, 1)


@pytest.mark.parametrize("format", FP4_FORMATS, ids=lambda format: format.name)
def test_close_to_the_reference(pool: Pool, format: Format) -> None:
    """Within what a product with int8 may be off, though there are two."""
    weights = sparse(Shape(576, 96, 768, num_experts=16, top_k=8), format)
    layer = DenseWeights(weights.norm, weights.shared_expert)
    for hidden in (normal(32, 576), with_outliers(32, 576)):
        _, out = run(pool, hidden, None, weights)
        _, expected = REFERENCE.moe(hidden, None, reference_of(weights))
        assert_close(out, expected, max_error=0.05, rms_error=8e-3)
        _, out = FeedForward(pool).dense_mlp(hidden.clone(), None, layer)
        _, expected = REFERENCE.dense_mlp(hidden, None, DenseWeights(layer.norm, dequantized(layer.mlp)))
        assert_close(out, expected, max_error=0.05, rms_error=8e-3)


@pytest.mark.parametrize("neurons", [96, 80, 48])
def test_every_kind_with_outliers(pool: Pool, neurons: int) -> None:
    hidden = with_outliers(21, 96)
    downs = every_kind(96, neurons)
    for name, gate_up in every_kind(2 * neurons, 96).items():
        for down in (downs.get(name), downs["bf16"]):
            if down is not None:
                layer = DenseWeights(norm_of(96), MlpWeights(gate_up, down))
                _, out = FeedForward(pool).dense_mlp(hidden.clone(), None, layer)
                assert_close(out, dense_of_words(hidden, layer), **WORDS)


@pytest.mark.parametrize("neurons", [96, 80, 48])
def test_what_down_takes_is_nearly_exact(pool: Pool, neurons: int) -> None:
    """gate and up are floats, so that nothing else is rounded."""
    hidden = normal(9, 80)
    for down in every_kind(80, neurons).values():
        weights = MlpWeights(prepare(random_float(2 * neurons, 80), "bf16"), down)
        layer = DenseWeights(norm_of(80), weights)
        _, out = FeedForward(pool).dense_mlp(hidden.clone(), None, layer)
        assert_close(out, dense_of_words(hidden, layer), max_error=1e-3, rms_error=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_dense(pool: Pool, num_tokens: int, guarded: None) -> None:
    hidden, update = normal(2, num_tokens, 80)
    layer = DenseWeights(norm_of(80), sparse(Shape()).shared_expert)
    summed, out = FeedForward(pool).dense_mlp(hidden.clone(), update, layer)
    assert torch.equal(summed, hidden + update)
    assert_close(out, dense_of_words(summed, layer), **WORDS)


def test_what_is_not_finite_stays_in_its_row(pool: Pool) -> None:
    weights, hidden = sparse(Shape(num_experts=40, num_groups=5, top_k_groups=2)), normal(5, 80)
    _, expected = run(pool, hidden, None, weights)
    broken = hidden.clone()
    broken[1, 3], broken[4, 0] = torch.nan, torch.inf
    _, out = run(pool, broken, None, weights)
    assert out[[1, 4]].isnan().all()
    assert torch.equal(out[[0, 2, 3]], expected[[0, 2, 3]])


def test_large_and_small_gates(pool: Pool) -> None:
    """silu where its exponential ends: at 0, and at x."""
    gate_up = torch.cat((torch.eye(32) * torch.logspace(-3, 3, 32).unsqueeze(1), torch.eye(32)))
    layer = DenseWeights(
        RmsNorm(torch.ones(32), 1e-5), MlpWeights(prepare(gate_up, "bf16"), prepare(torch.eye(32), "bf16"))
    )
    hidden = normal(9, 32)
    _, out = FeedForward(pool).dense_mlp(hidden.clone(), None, layer)
    _, expected = REFERENCE.dense_mlp(hidden, None, DenseWeights(layer.norm, dequantized(layer.mlp)))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-9)


def test_no_tokens(pool: Pool) -> None:
    _, out = run(pool, torch.zeros(0, 80), None, sparse(Shape()))
    assert out.shape == (0, 80)


def test_layers_are_told_apart(pool: Pool) -> None:
    feed_forward, hidden = FeedForward(pool), normal(3, 80)
    first = DenseWeights(norm_of(80), sparse(Shape()).shared_expert)
    second = DenseWeights(RmsNorm(2 * first.norm.weight, 1e-5), first.mlp)
    outs = [feed_forward.dense_mlp(hidden.clone(), None, layer)[1] for layer in (first, second, first)]
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])


def test_what_does_not_fit_is_named(pool: Pool) -> None:
    weights = sparse(Shape())
    with pytest.raises(ValueError, match=r"router's weight is \[8, 80\]"):
        FeedForward(pool).moe(torch.zeros(1, 80), None, weights)
    with pytest.raises(ValueError, match=r"hidden is .* \[1, 81\]"):
        run(pool, torch.zeros(1, 81), None, weights)
    with pytest.raises(ValueError, match=r"update is .* \[2, 80\]"):
        run(pool, torch.zeros(1, 80), torch.zeros(2, 80), weights)
    with pytest.raises(ValueError, match="experts 6 to 13 are held, and the router has 8"):
        run(pool, torch.zeros(1, 80), None, replace(weights, first_expert=6))
    with pytest.raises(ValueError, match=r"shared_expert has \[192, 80\] and \[96, 80\]"):
        mlp = weights.shared_expert
        run(
            pool,
            torch.zeros(1, 80),
            None,
            replace(weights, shared_expert=MlpWeights(mlp.gate_up, prepare(torch.ones(96, 80)))),
        )
    with pytest.raises(ValueError, match=r"experts has .* not stacks"):
        run(pool, torch.zeros(1, 80), None, replace(weights, experts=weights.shared_expert))
