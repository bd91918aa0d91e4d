"""The experts of many tokens against float64 experts, one after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from closeness import assert_close
from fp4_weights import (
    FORMS,
    Form,
    gate_up_reference,
    in_fragment_order,
    normal,
    packed,
    product_reference,
    random_ids,
    random_stack,
)
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.triton import activation_order
from nybble.kernels.triton.expert_grouped import (
    ExpertGroupedLaunch,
    expert_grouped_launch,
    grouped_down,
    grouped_gate_up,
    most_block_m,
)
from nybble.kernels.triton.expert_schedule import (
    ExpertSchedule,
    expert_schedule,
    expert_schedule_launch,
    schedule_capacity,
)
from nybble.kernels.triton.launch import recorded_launches

TILE = ExpertGroupedLaunch(block_rows=128, splits=1, is_joined=True, num_warps=4, num_stages=3)
SPLIT = ExpertGroupedLaunch(block_rows=64, splits=2, is_joined=False, num_warps=2, num_stages=3)


@dataclass(frozen=True)
class Experts:
    """ids: of each token, for num_experts; held: those in the stack, each num_inputs by num_outputs."""

    num_inputs: int
    num_outputs: int
    held: range
    num_experts: int
    ids: Tensor
    block_m: int = 8

    @property
    def num_pairs(self) -> int:
        return self.ids.numel()

    def schedule(self) -> ExpertSchedule:
        launch = expert_schedule_launch(self.num_pairs, ARCHES[0])
        schedule = expert_schedule(self.ids, self.held.start, len(self.held), self.block_m, launch=launch)
        return replace(schedule, is_partial=len(self.held) < self.num_experts)


def experts(num_tokens: int, top_k: int, held: range, num_experts: int, **sizes: int) -> Experts:
    ids = random_ids(num_tokens, top_k, range(num_experts))
    return Experts(
        **({"num_inputs": 96, "num_outputs": 32} | sizes), held=held, num_experts=num_experts, ids=ids
    )


def all_on(expert: int, num_tokens: int) -> Tensor:
    return torch.full((num_tokens, 1), expert, dtype=torch.int32, device=DEVICE)


ALL_HELD = experts(9, 2, range(4), 4)
CASES = {
    "all-held": ALL_HELD,
    "part-held": experts(11, 3, range(2, 4), 6, num_inputs=192),
    "eight": experts(3, 8, range(16), 16, num_inputs=64),
    "one-token": experts(1, 3, range(5), 5, num_inputs=320),
    "larger-tiles": experts(20, 1, range(2), 2, block_m=16),
    "one-expert": Experts(96, 64, range(4), 4, all_on(2, 21)),
    "empty-experts": Experts(64, 32, range(8), 8, random_ids(6, 2, range(3, 6))),
    "none-held": Experts(64, 32, range(4, 8), 8, random_ids(5, 2, range(4))),
}
# Each form once, each case once.
CASES_WITH_FORMS = [pytest.param(ALL_HELD, form, id=f"all-held-{form}") for form in FORMS[1:]] + [
    pytest.param(case, FORMS[0], id=name) for name, case in CASES.items()
]


def gate_up_of(
    x: Tensor, case: Experts, form: Form, launch: ExpertGroupedLaunch, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """What the kernel gives, in natural order, and float64 [pairs, I]: NaN for experts not held."""
    stack, top_k = (
        random_stack(form, len(case.held), 2 * case.num_outputs, case.num_inputs),
        case.ids.shape[1],
    )
    matrices = packed(stack, form)
    actual = grouped_gate_up(in_fragment_order(x), case.schedule(), top_k, matrices, dtype, launch=launch)
    expected = torch.full((case.num_pairs, case.num_outputs), torch.nan, dtype=torch.float64)
    for pair, expert in enumerate(case.ids.flatten().tolist()):
        if expert in case.held:
            weight = stack[expert - case.held.start].dequantize()
            expected[pair] = gate_up_reference(x[pair // top_k], weight)
    return activation_order.from_fragment_order(actual).cpu(), expected


def assert_gate_up(actual: Tensor, expected: Tensor, max_error: float, rms_error: float) -> None:
    """Rows of experts elsewhere are as they were, columns of padding are zeros."""
    is_held = ~expected[:, 0].isnan()
    width = expected.shape[1]
    assert actual[~is_held].isnan().all()
    assert not actual[is_held][:, width:].any()
    assert_close(actual[is_held][:, :width], expected[is_held], max_error=max_error, rms_error=rms_error)


def down_of(x: Tensor, case: Experts, form: Form, launch: ExpertGroupedLaunch) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and float64 [T, top_k, N], of x [pairs, I]; rows no one should read are NaN."""
    stack, x = random_stack(form, len(case.held), case.num_outputs, case.num_inputs), x.clone()
    weights = normal(*case.ids.shape).abs()
    expected = torch.zeros(case.num_pairs, case.num_outputs, dtype=torch.float64)
    for pair, expert in enumerate(case.ids.flatten().tolist()):
        if expert in case.held:
            product = product_reference(x[pair], stack[expert - case.held.start].dequantize())
            expected[pair] = product * float(weights.flatten()[pair])
        else:
            x[pair] = torch.nan
    matrices = packed(stack, form)
    actual = grouped_down(in_fragment_order(x), case.schedule(), weights, matrices, launch=launch)
    return actual, expected.view(*case.ids.shape, -1)


def gate_up_input(case: Experts) -> Tensor:
    return normal(len(case.ids), case.num_inputs)


def down_input(case: Experts) -> Tensor:
    return normal(case.num_pairs, case.num_inputs)


@pytest.mark.parametrize(("case", "form"), CASES_WITH_FORMS)
def test_gate_up(case: Experts, form: Form) -> None:
    pair = gate_up_of(gate_up_input(case), case, form, TILE)
    assert_gate_up(*pair, max_error=1e-5, rms_error=1e-6)


@pytest.mark.parametrize(("case", "form"), CASES_WITH_FORMS)
def test_down(case: Experts, form: Form) -> None:
    assert_close(*down_of(down_input(case), case, form, TILE), max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("name", ["all-held", "part-held", "one-expert"])
def test_columns_are_shared_among_warps(name: str) -> None:
    case, form = CASES[name], FORMS[0]
    pair = gate_up_of(gate_up_input(case), case, form, SPLIT)
    assert_gate_up(*pair, max_error=1e-5, rms_error=1e-6)
    assert_close(*down_of(down_input(case), case, form, SPLIT), max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("launch", [TILE, SPLIT], ids=["tile", "split"])
@pytest.mark.parametrize("num_outputs", [1, 40, 130])
def test_down_to_any_number_of_rows(num_outputs: int, launch: ExpertGroupedLaunch) -> None:
    case = replace(ALL_HELD, num_outputs=num_outputs)
    assert_close(*down_of(down_input(case), case, FORMS[0], launch), max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sixteen_bit_activations(form: Form) -> None:
    dtype = torch.float16 if form.is_float16 else torch.bfloat16
    pair = gate_up_of(gate_up_input(ALL_HELD).to(dtype), ALL_HELD, form, TILE, dtype)
    assert_gate_up(*pair, max_error=3e-2, rms_error=3e-3)
    assert_close(
        *down_of(down_input(ALL_HELD).to(dtype), ALL_HELD, form, TILE), max_error=5e-6, rms_error=1e-6
    )


def test_float16_activations_are_finite() -> None:
    form = FORMS[-1]
    actual, expected = gate_up_of(200 * gate_up_input(ALL_HELD), ALL_HELD, form, TILE, torch.float16)
    assert (expected.abs() > 65504).any()
    assert_gate_up(actual, expected.clamp(-65504, 65504), max_error=1e-2, rms_error=3e-3)


@pytest.mark.parametrize("arch", ARCHES)
def test_launches_that_are_chosen(arch: int) -> None:
    case = replace(ALL_HELD, block_m=min(16, most_block_m(arch)))
    launch = expert_grouped_launch(case.block_m, 2 * case.num_outputs, case.num_inputs, arch)
    pair = gate_up_of(gate_up_input(case), case, FORMS[0], launch)
    assert_gate_up(*pair, max_error=1e-5, rms_error=1e-6)
    launch = expert_grouped_launch(case.block_m, case.num_outputs, case.num_inputs, arch)
    assert_close(*down_of(down_input(case), case, FORMS[0], launch), max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("launch", [TILE, SPLIT], ids=["tile", "split"])
def test_two_runs_are_equal(launch: ExpertGroupedLaunch) -> None:
    case, form = CASES["part-held"], FORMS[0]
    first, second = (gate_up_of(gate_up_input(case), case, form, launch)[0] for _ in range(2))
    assert first.nan_to_num().equal(second.nan_to_num())
    first, second = (down_of(down_input(case), case, form, launch)[0] for _ in range(2))
    assert first.equal(second)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_launches_are_possible(arch: int, shards: int) -> None:
    """GLM-4.7: a shard's experts have 3072 / shards rows of gate and up, and 5120 of down."""
    for block_m in (8, 16, 32, 64):
        for num_rows, width in ((3072 // shards, 5120), (5120, 1536 // shards)):
            launch = expert_grouped_launch(min(block_m, most_block_m(arch)), num_rows, width, arch)
            assert launch.block_rows % 32 == 0  # half of them gate's, and those in groups of 16
            assert launch.splits in (1, launch.num_warps)
            assert not (launch.is_joined and launch.splits > 1)


def test_grids_are_as_large_as_the_worst_routing_needs() -> None:
    """The host knows the number of tokens, not that of tiles."""
    case = replace(ALL_HELD, ids=ALL_HELD.ids.to("meta"))
    with recorded_launches() as launches:
        matrices = packed(random_stack(FORMS[0], 4, 64, 96), FORMS[0])
        grouped_gate_up(normal(9, 128).to("meta"), case.schedule(), 2, matrices, torch.bfloat16, launch=TILE)
    assert launches[-1].grid == (1, schedule_capacity(18, 4, 8) // 8)
