"""Bits that do not depend on neighbours: of 1 to 64 rows together, and of prompts cut in many ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from torch import Tensor

from nybble.kernels import invariant_arithmetic
from nybble.kernels.arithmetic import PLAIN
from nybble.kernels.invariant_arithmetic import InvariantArithmetic
from nybble.kernels.ops import MlpWeights, RmsNorm, RouterWeights
from nybble.kernels.reference_ops import experts, rms_norm, route

DTYPES = [torch.float32, torch.bfloat16]
COUNTS = [*range(1, 65), 130]
FEW_COUNTS = [1, 2, 3, 9, 40, 64]
# Rows and columns of a matrix: of the demo model, of tiny ones, and of none.
MATRICES = [(960, 576), (192, 576), (576, 96), (8, 64), (5, 7), (1, 3), (300, 1000)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check_rows(function: Callable[[Tensor], Tensor], x: Tensor, counts: list[int] = COUNTS) -> None:
    """So many rows of x [T, N] from either end, against one by one."""
    alone = torch.cat([function(row.unsqueeze(0)) for row in x])
    for count in counts:
        assert torch.equal(function(x[:count]), alone[:count]), f"the first {count} rows"
        assert torch.equal(function(x[-count:]), alone[-count:]), f"the last {count} rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), MATRICES)
def test_products(rows: int, columns: int, dtype: torch.dtype, threads: int) -> None:
    weight, x = _normal(rows, columns, dtype=dtype), _normal(130, columns, seed=1, dtype=dtype)
    bias, arithmetic = _normal(rows, seed=2, dtype=dtype), InvariantArithmetic()
    _check_rows(lambda x: arithmetic.linear(x, weight, bias), x)
    expected = F.linear(x.double(), weight.double(), bias.double())
    rounding = torch.finfo(dtype).eps
    actual = arithmetic.linear(x, weight, bias)
    assert_close(actual, expected, max_error=100 * rounding, rms_error=10 * rounding)


def test_torch_does_not_promise_it() -> None:
    """Or all this would be for nothing."""
    weight, x = _normal(300, 1000), _normal(64, 1000, seed=1)
    with pytest.raises(AssertionError, match="rows"):
        _check_rows(lambda x: PLAIN.linear(x, weight), x)
    with pytest.raises(AssertionError, match="rows"):
        _check_rows(F.silu, _normal(64, 18))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 8, 18, 100, 1537])
@pytest.mark.parametrize("function", [F.silu, torch.sigmoid, torch.exp])
def test_functions_of_numbers(
    function: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype, threads: int
) -> None:
    arithmetic, x = InvariantArithmetic(), _normal(130, width, dtype=dtype) * 3
    _check_rows(lambda x: arithmetic.elementwise(function, x), x)
    assert_close(arithmetic.elementwise(function, x), function(x), max_error=1e-2, rms_error=1e-3)
    assert arithmetic.elementwise(function, x[:0]).shape == (0, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 18, 100, 576, 5120])
def test_norms(width: int, dtype: torch.dtype, threads: int) -> None:
    """Without any help: torch adds up each row by itself."""
    norm = RmsNorm(_normal(width, dtype=dtype), 1e-5)
    _check_rows(lambda x: rms_norm(x, norm), _normal(130, width, seed=1, dtype=dtype))
    heads = _normal(130, 1, width, dtype=dtype)
    _check_rows(lambda x: rms_norm(x, norm), heads)


@pytest.mark.parametrize("num_groups", [1, 4])
def test_experts(num_groups: int, threads: int) -> None:
    """Routing and experts of each token, however many others choose the same ones."""
    arithmetic, count = InvariantArithmetic(), 12
    groups = num_groups, min(num_groups, 2)
    router = RouterWeights(_normal(count, 24), _normal(count, seed=1) / 4, 4, *groups, True, 2.5)
    weights = MlpWeights(_normal(count, 2 * 18, 24) / 5, _normal(count, 24, 18) / 4)

    def moe(x: Tensor) -> Tensor:
        return experts(x, route(x, router, arithmetic), weights, arithmetic=arithmetic)

    _check_rows(moe, _normal(70, 24, seed=3), FEW_COUNTS)


GEOMETRIES = [(9, 3, 64), (4, 2, 16), (12, 1, 128), (5, 1, 7)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), GEOMETRIES)
def test_attention_however_a_prompt_is_cut(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, threads: int
) -> None:
    """A token has the same bits decoded and prefilled, alone and in chunks, across tiles of keys."""
    context, arithmetic = 300, InvariantArithmetic()
    query = _normal(context, heads, head_dim, dtype=dtype) * 2
    keys, values = (_normal(context, kv_heads, head_dim, seed=seed, dtype=dtype) for seed in (1, 2))
    whole = arithmetic.attention(query, keys, values)
    assert whole.dtype == dtype
    for end in (1, 17, 128, 129, 300):
        for count in (1, 7, 64, end):
            if count <= end:
                part = arithmetic.attention(query[end - count : end], keys[:end], values[:end])
                assert torch.equal(part, whole[end - count : end]), (end, count)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (1, 300), (300, 300), (7, 129)])
def test_attention_is_that_of_float64(
    tokens: int, context: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    query = _normal(tokens, heads, head_dim) * 3
    keys, values = (_normal(context, kv_heads, head_dim, seed=seed) for seed in (1, 2))
    expected = PLAIN.attention(query.double(), keys.double(), values.double())
    actual = InvariantArithmetic().attention(query, keys, values)
    assert_close(actual, expected, max_error=2e-5, rms_error=2e-6)


def test_rows_one_by_one() -> None:
    seen = []

    def function(x: Tensor, y: Tensor) -> Tensor:
        seen.append((tuple(x.shape), tuple(y.shape)))
        return x.sum(dim=1) + y

    x, y = _normal(3, 5), _normal(3)
    assert torch.equal(InvariantArithmetic().by_rows(function, x, y), x.sum(dim=1) + y)
    assert seen == [((1, 5), (1,))] * 3


@pytest.mark.parametrize(
    ("is_wrong", "expected"),
    [
        (lambda rows, place: False, (8, 64)),
        (lambda rows, place: rows == 64, (8,)),  # other bits in large tiles
        (lambda rows, place: rows == 64 and place == 60, (8,)),
        (lambda rows, place: rows == 8 and place == 7, (1,)),  # a row's bits depend on its place
    ],
)
def test_libraries_that_treat_rows_differently_are_found_out(
    monkeypatch: pytest.MonkeyPatch, is_wrong: Callable[[int, int], bool], expected: tuple[int, ...]
) -> None:
    exact = invariant_arithmetic._product

    def product(x: Tensor, weight: Tensor) -> Tensor:
        result = exact(x, weight)
        for place in range(x.shape[-2]):
            if is_wrong(x.shape[-2], place):
                result[..., place, :] *= 1 + 2.0**-22
        return result

    monkeypatch.setattr(invariant_arithmetic, "_product", product)
    arithmetic, weight = InvariantArithmetic(), _normal(96, 64)
    assert arithmetic._sizes(weight) == expected
    _check_rows(lambda x: arithmetic.linear(x, weight), _normal(130, 64, seed=1))


def test_neighbours_that_change_a_row_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = invariant_arithmetic._product

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return exact(x, weight) + x.sum() * 1e-3 if x.shape[-2] > 1 else exact(x, weight)

    monkeypatch.setattr(invariant_arithmetic, "_product", product)
    assert InvariantArithmetic()._sizes(_normal(96, 64)) == (1,)
