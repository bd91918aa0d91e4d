from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nybble.kernels.cpu.cpu_matrix import dequantize
from nybble.kernels.cpu.cpu_router import prepare_router, router_matrix
from nybble.kernels.ops import RouterWeights

ROUTER = RouterWeights(torch.randn(20, 50), torch.randn(20), 3, 4, 2, True, 1.0)


def test_weight_is_what_it_was() -> None:
    prepared = prepare_router(ROUTER)
    assert prepared.weight.shape == (2, 64, 16)
    assert torch.equal(dequantize(router_matrix(prepared, 50)), ROUTER.weight)
    assert torch.equal(prepared.bias, ROUTER.bias)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (replace(ROUTER, num_groups=3), "20 experts do not divide into 3 groups"),
        (replace(ROUTER, num_groups=0), "20 experts do not divide into 0 groups"),
        (replace(ROUTER, top_k_groups=5), "top_k_groups is 5 of 4 groups"),
        (replace(ROUTER, num_groups=20, top_k_groups=4), "have one each"),
        (replace(ROUTER, top_k=11), "top_k is 11, and the chosen groups have 10 experts"),
        (replace(ROUTER, top_k=0), "top_k is 0"),
    ],
)
def test_what_is_refused(router: RouterWeights, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_router(router)


def test_weight_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="not that of 20 experts and width 80"):
        router_matrix(prepare_router(ROUTER), 80)
