"""The native CPU backend's form of a router."""

from __future__ import annotations

from dataclasses import replace

import torch

from nybble.kernels.cpu.cpu_matrix import BLOCK_COLUMNS, TILE_ROWS, CpuMatrix, Kind, prepare_float32
from nybble.kernels.ops import RouterWeights

_MOST_GROUPS = 64  # NYBBLE_MAX_GROUPS of native/routing.h


def prepare_router(router: RouterWeights) -> RouterWeights:
    """Its weight in lines of 16 experts: float32 [ceil(E / 16), H padded to a multiple of 32, 16].

    Raises:
        ValueError: experts do not divide into the groups, or the chosen groups have too few.
    """
    num_experts, num_groups = len(router.bias), router.num_groups
    if not 1 <= num_groups <= _MOST_GROUPS or num_experts % num_groups:
        raise ValueError(
            f"{num_experts} experts do not divide into {num_groups} groups (1 to {_MOST_GROUPS})"
        )
    if not 1 <= router.top_k_groups <= num_groups:
        raise ValueError(f"top_k_groups is {router.top_k_groups} of {num_groups} groups")
    size = num_experts // num_groups
    if router.top_k_groups < num_groups and size < 2:
        raise ValueError("groups are chosen by their two best experts, and have one each")
    if not 1 <= router.top_k <= router.top_k_groups * size:
        raise ValueError(
            f"top_k is {router.top_k}, and the chosen groups have {router.top_k_groups * size} experts"
        )
    lines = prepare_float32(router.weight).codes.view(torch.float32)
    weight = lines.view(lines.shape[1], lines.shape[2] * BLOCK_COLUMNS, TILE_ROWS)
    return replace(router, weight=weight, bias=router.bias.float().contiguous())


def router_matrix(router: RouterWeights, width: int) -> CpuMatrix:
    """The weight [E, width] of a router that is prepared.

    Raises:
        ValueError: it is not, or is of another width.
    """
    num_experts = len(router.bias)
    tiles, blocks = -(-num_experts // TILE_ROWS), -(-width // BLOCK_COLUMNS)
    if router.weight.shape != (tiles, blocks * BLOCK_COLUMNS, TILE_ROWS):
        raise ValueError(
            f"a router's weight is {list(router.weight.shape)}, not that of {num_experts} experts "
            f"and width {width} from prepare_router"
        )
    codes = router.weight.view(torch.uint8).view(1, tiles, blocks, -1)
    empty = torch.empty((1, tiles, blocks, 0), dtype=torch.uint8)
    return CpuMatrix(Kind.FLOAT32, (num_experts, width), codes, empty, torch.empty((1, 0)))
