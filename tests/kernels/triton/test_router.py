"""The router's kernels against the reference, and what the reference leaves open: ties, NaN, order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closeness import assert_close
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.ops import RouterWeights, Routing
from nybble.kernels.reference_ops import route
from nybble.kernels.triton.launch import recorded_launches
from nybble.kernels.triton.router import router_choice, router_launch, router_logits, routing

FLOAT32 = {"max_error": 2e-5, "rms_error": 2e-6}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Experts, top_k, groups, groups kept, normalize, scale.
ROUTERS = {
    "glm-4.7": (160, 8, 1, 1, True, 2.5),
    "groups": (16, 4, 4, 2, True, 2.5),
    "one-of-six-groups": (12, 2, 6, 1, True, 1.5),
    "seven-of-eight-groups": (40, 7, 8, 7, False, 1.0),
    "all-groups": (16, 5, 4, 4, True, 1.0),
    "unnormalized": (8, 3, 1, 1, False, 1.0),
    "one-expert": (7, 1, 1, 1, True, 2.5),
    "all-experts": (6, 6, 1, 1, True, 2.5),
}


def _normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def _router(name: str, width: int = 1) -> RouterWeights:
    num_experts, *settings = ROUTERS[name]
    weight = _normal(num_experts, width, scale=width**-0.5)
    return RouterWeights(weight, _normal(num_experts, seed=1, scale=0.2), *settings)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    launch = router_launch(x.shape[0], *weight.shape, x.dtype, ARCHES[0])
    return router_logits(x, weight, launch=launch)


def _choose(logits: Tensor, router: RouterWeights) -> Routing:
    return router_choice(logits.unsqueeze(0), router)


def _reference_choice(logits: Tensor, router: RouterWeights) -> Routing:
    identity = torch.eye(logits.shape[1], device=DEVICE)
    return route(logits, replace(router, weight=identity))


def _assert_same(actual: Routing, expected: Routing, num_experts: int) -> None:
    """The same experts, each once, with the same weights."""
    assert actual.ids.dtype == torch.int32
    assert actual.ids.sort().values.equal(expected.ids.sort().values.int())
    shape = len(actual.ids), num_experts
    dense, wanted = (
        torch.zeros(shape, device=DEVICE).scatter(1, routing.ids.long(), routing.weights)
        for routing in (actual, expected)
    )
    assert_close(dense, wanted, **FLOAT32)


def _assert_valid(ids: Tensor, num_experts: int) -> None:
    for row in ids.tolist():
        assert len(set(row)) == len(row)
        assert set(row) <= set(range(num_experts))


# Choice.


@pytest.mark.parametrize("name", ROUTERS)
def test_choice(name: str) -> None:
    router = _router(name)
    num_experts = len(router.bias)
    logits = _normal(6, num_experts, seed=2)
    _assert_same(_choose(logits, router), _reference_choice(logits, router), num_experts)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_every_top_k(top_k: int) -> None:
    router = replace(_router("groups"), top_k=top_k)
    logits = _normal(3, 16, seed=2)
    _assert_same(_choose(logits, router), _reference_choice(logits, router), 16)


def test_the_best_comes_first() -> None:
    router = replace(_router("unnormalized"), bias=torch.zeros(8, device=DEVICE))
    logits = torch.tensor([[0.5, -1.0, 3.0, 0.0, 2.0, -9.0, 1.0, -0.5]], device=DEVICE)
    assert _choose(logits, router).ids.tolist() == [[2, 4, 6]]


def test_sums_of_splits_are_added_in_order() -> None:
    """In float32 a unit is lost beside 2^25, unless both of those come first and cancel."""
    router = replace(_router("unnormalized"), bias=torch.zeros(8, device=DEVICE), top_k=2)
    splits = torch.zeros(3, 1, 8, device=DEVICE)
    splits[:, 0, 5] = torch.tensor([2.0**25, -(2.0**25), 1.0])
    splits[:, 0, 2] = torch.tensor([2.0**25, 1.0, -(2.0**25)])
    splits[0, 0, [0, 1, 3, 4, 6, 7]] = -5.0
    routed = router_choice(splits, router)
    assert routed.ids.tolist() == [[5, 2]]
    assert_close(routed.weights, torch.tensor([[1.0, 0.0]]).sigmoid(), **FLOAT32)


def test_of_equal_choices_the_lower_id_is_taken() -> None:
    router = _router("glm-4.7")
    router = replace(router, bias=torch.zeros_like(router.bias))
    logits = torch.zeros(2, 160, device=DEVICE)
    logits[1, [150, 31, 100]] = 1.0
    assert _choose(logits, router).ids.tolist() == [[*range(8)], [31, 100, 150, *range(5)]]


def test_of_equal_groups_the_lower_is_kept() -> None:
    router = replace(_router("groups"), bias=torch.zeros(16, device=DEVICE))
    logits = torch.zeros(2, 16, device=DEVICE)
    logits[1, [9, 10]] = 1.0
    assert _choose(logits, router).ids.tolist() == [[0, 1, 2, 3], [9, 10, 0, 1]]


def test_negative_choices_in_kept_groups_beat_weak_groups() -> None:
    """A mask of 0 instead of -inf would prefer an expert outside the kept groups."""
    router = replace(_router("one-of-six-groups"), bias=torch.full((12,), -3.0, device=DEVICE))
    router.bias[4:6] = torch.tensor([-1.5, -1.6])
    assert _choose(_normal(3, 12), router).ids.sort().values.tolist() == [[4, 5]] * 3


def test_groups_with_fewer_experts_than_top_k_are_filled_up_from_others() -> None:
    router = replace(_router("one-of-six-groups"), top_k=5)
    logits = _normal(3, 12, seed=2)
    routed, expected = _choose(logits, router), _reference_choice(logits, replace(router, top_k=2))
    _assert_valid(routed.ids, 12)
    assert routed.ids[:, :2].sort().values.equal(expected.ids.sort().values.int())


def test_the_bias_chooses_and_does_not_weigh() -> None:
    router = replace(_router("unnormalized"), bias=torch.zeros(8, device=DEVICE), top_k=1)
    router.bias[7] = 5.0
    logits = _normal(4, 8)
    routed = _choose(logits, router)
    assert routed.ids.tolist() == [[7]] * 4
    assert_close(routed.weights[:, 0], logits[:, 7].sigmoid(), **FLOAT32)


def test_extreme_logits() -> None:
    """Scores of 0 do not divide by zero, and those of 1 are the demo model's."""
    router = replace(_router("unnormalized"), bias=torch.zeros(8, device=DEVICE), normalize=True)
    logits = torch.full((2, 8), -1e4, device=DEVICE)
    logits[1, [1, 4, 6]] = 1e4
    routed = _choose(logits, router)
    assert routed.weights[0].tolist() == [0.0] * 3
    assert routed.ids[1].tolist() == [1, 4, 6]
    assert_close(routed.weights[1], torch.full((3,), 1 / 3), **FLOAT32)


@pytest.mark.parametrize("name", ["glm-4.7", "groups", "seven-of-eight-groups", "all-experts"])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=str)
def test_logits_that_are_not_finite_spoil_their_own_token_only(name: str, value: float) -> None:
    router = _router(name)
    num_experts = len(router.bias)
    logits = _normal(5, num_experts, seed=2)
    expected = _choose(logits, router)
    logits[1] = value
    logits[3, ::3] = value
    routed = _choose(logits, router)
    _assert_valid(routed.ids, num_experts)
    for token in (0, 2, 4):
        assert routed.ids[token].equal(expected.ids[token])
        assert routed.weights[token].equal(expected.weights[token])
    assert routed.weights[1].isnan().all().item() == (value != value)


@pytest.mark.parametrize("value", [torch.nan, -torch.nan], ids=["nan", "negative-nan"])
def test_a_choice_that_is_not_a_number_comes_first(value: float) -> None:
    router = replace(_router("unnormalized"), bias=torch.zeros(8, device=DEVICE))
    router.bias[4] = value
    logits = torch.arange(8.0, device=DEVICE).unsqueeze(0)
    logits[0, 1] = value
    assert _choose(logits, router).ids.tolist() == [[1, 4, 7]]


def test_a_bias_that_is_not_a_number_names_experts() -> None:
    router = replace(_router("groups"), bias=torch.full((16,), torch.nan, device=DEVICE))
    _assert_valid(_choose(_normal(3, 16), router).ids, 16)


# Logits.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "width"),
    [(1, 160, 1024), (3, 5, 24), (8, 16, 576), (9, 16, 100), (17, 70, 64), (70, 12, 96)],
)
def test_logits(num_tokens: int, num_experts: int, width: int, dtype: torch.dtype) -> None:
    x, weight = _normal(num_tokens, width, dtype=dtype), _normal(num_experts, width, seed=1)
    logits = _logits(x, weight)
    assert logits.dtype == torch.float32
    assert_close(logits.double().sum(0), x.double() @ weight.double().T, **FLOAT32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [4, 32])
def test_a_weight_keeps_all_its_bits(num_tokens: int, dtype: torch.dtype) -> None:
    """Each token has one column of ones: its logits are weights, exactly."""
    weight = _normal(16, 64)
    columns = torch.arange(num_tokens, device=DEVICE) * 37 % 64
    x = torch.eye(64, device=DEVICE, dtype=dtype)[columns]
    assert _logits(x, weight).sum(0).equal(weight[:, columns].T)


@pytest.mark.parametrize("num_tokens", [5, 20])
def test_slices(num_tokens: int) -> None:
    """What lies between their rows is not read."""
    x, weight = torch.empty(num_tokens, 200, device=DEVICE), torch.empty(12, 150, device=DEVICE)
    parts = x[:, 30:100], weight[:, 7:77]
    for part, seed in zip(parts, (0, 1), strict=True):
        part.copy_(_normal(*part.shape, seed=seed))
    assert_close(_logits(*parts).sum(0), parts[0] @ parts[1].T, **FLOAT32)


@pytest.mark.parametrize("arch", ARCHES)
def test_the_widest_tiles_of_tokens(arch: int) -> None:
    """Launched as for a long prefill, with few tokens: most of the tile is empty."""
    x, weight = _normal(11, 64, dtype=torch.bfloat16), _normal(6, 64, seed=1)
    launch = router_launch(16_384, 6, 64, torch.bfloat16, arch)
    logits = router_logits(x, weight, launch=launch)
    assert_close(logits.sum(0), x.float() @ weight.T, **FLOAT32)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 32, 33, 64, 512, 2048, 16_384])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches_fill_the_chip_and_bound_the_splits(num_tokens: int, dtype: torch.dtype, arch: int) -> None:
    launch = router_launch(num_tokens, 160, 5120, dtype, arch)
    assert launch.split_width % launch.block_width == 0
    splits = -(-5120 // launch.split_width)
    assert splits <= 20
    assert launch.has_matrix_tiles or launch.split_width == launch.block_width
    programs = -(-160 // launch.block_experts) * -(-num_tokens // launch.block_tokens) * splits
    assert programs >= 60


# Both.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [5, 10])
@pytest.mark.parametrize("name", ["glm-4.7", "groups"])
def test_routing(name: str, num_tokens: int, dtype: torch.dtype) -> None:
    router = _router(name, 192)
    num_experts = len(router.bias)
    x = _normal(num_tokens, 192, seed=2, dtype=dtype)
    launch = router_launch(num_tokens, num_experts, 192, dtype, ARCHES[-1])
    routed = routing(x, router, launch=launch)
    _assert_same(routed, route(x, router), num_experts)
    again = routing(x, router, launch=launch)
    assert again.ids.equal(routed.ids)
    assert again.weights.equal(routed.weights)


def test_a_token_that_is_not_a_number_spoils_itself_only() -> None:
    router, x = _router("groups", 64), _normal(10, 64, seed=2, dtype=torch.bfloat16)
    launch = router_launch(10, 16, 64, torch.bfloat16, ARCHES[0])
    expected = routing(x, router, launch=launch)
    x[7] = torch.nan
    routed = routing(x, router, launch=launch)
    _assert_valid(routed.ids, 16)
    others = [token for token in range(10) if token != 7]
    assert routed.ids[others].equal(expected.ids[others])
    assert routed.weights[others].equal(expected.weights[others])
    assert routed.weights[7].isnan().all()


def test_no_tokens() -> None:
    launch = router_launch(0, 16, 64, torch.bfloat16, ARCHES[0])
    x = torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE)
    assert routing(x, _router("groups", 64), launch=launch).ids.shape == (0, 4)


@pytest.mark.parametrize("num_tokens", [1, 300])
def test_two_launches(num_tokens: int) -> None:
    router = _router("glm-4.7", 64)
    launch = router_launch(num_tokens, 160, 64, torch.bfloat16, ARCHES[0])
    with recorded_launches() as launches:
        x = torch.empty(num_tokens, 64, dtype=torch.bfloat16, device="meta")
        routing(x, router, launch=launch)
    assert len(launches) == 2
