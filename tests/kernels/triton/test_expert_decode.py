"""The experts of a few tokens against float64 experts, one after the other."""

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
    random_weight,
)
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.quantized_tensor import QuantizedTensor
from nybble.kernels.triton import activation_order
from nybble.kernels.triton.expert_decode import (
    MAX_TOKENS,
    ExpertDecodeLaunch,
    expert_down,
    expert_down_launch,
    expert_gate_up,
    expert_gate_up_launch,
)

WIDE = ExpertDecodeLaunch(block_rows=32, splits=4, num_stages=3)
NARROW = ExpertDecodeLaunch(block_rows=16, splits=2, num_stages=3)


@dataclass(frozen=True)
class Experts:
    """held: numbers of the experts in the stack. num_inputs by num_outputs is the shape of each."""

    num_inputs: int
    num_outputs: int
    held: range
    num_experts: int
    num_tokens: int
    top_k: int
    has_shared: bool

    def ids(self) -> Tensor:
        return random_ids(self.num_tokens, self.top_k, range(self.num_experts))

    def weights(self, form: Form, num_rows: int) -> tuple[QuantizedTensor, QuantizedTensor | None]:
        """The stack, and the shared expert's matrix."""
        routed = random_stack(form, len(self.held), num_rows, self.num_inputs)
        return routed, random_weight(form, num_rows, self.num_inputs, seed=99) if self.has_shared else None


ALL_HELD = Experts(96, 32, range(6), 6, num_tokens=2, top_k=3, has_shared=True)
CASES = {
    "all-held": ALL_HELD,
    "part-held": Experts(192, 32, range(2, 5), 8, num_tokens=3, top_k=3, has_shared=False),
    "part-held-shared": Experts(64, 96, range(3, 6), 6, num_tokens=2, top_k=3, has_shared=True),
    "one-expert": Experts(320, 64, range(3), 3, num_tokens=1, top_k=1, has_shared=False),
    "one-expert-shared": Experts(64, 32, range(3), 3, num_tokens=2, top_k=1, has_shared=True),
    "eight": Experts(64, 32, range(16), 16, num_tokens=1, top_k=8, has_shared=True),
}
# Each form once, each case once.
CASES_WITH_FORMS = [pytest.param(ALL_HELD, form, id=f"all-held-{form}") for form in FORMS[1:]] + [
    pytest.param(case, FORMS[0], id=name) for name, case in CASES.items()
]


def gate_up_of(
    x: Tensor,
    ids: Tensor,
    case: Experts,
    form: Form,
    launch: ExpertDecodeLaunch,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """What the kernel gives, in natural order, and float64 [T, slots, I]: NaN for experts not held."""
    stack, shared = case.weights(form, 2 * case.num_outputs)
    held = packed(stack, form), packed(shared, form), case.held.start
    actual = expert_gate_up(in_fragment_order(x), ids, *held, dtype, launch=launch)
    expected = torch.full((*actual.shape[:2], case.num_outputs), torch.nan, dtype=torch.float64)
    for token, slot in (ids.cpu() >= 0).nonzero().tolist():
        if (expert := int(ids[token, slot])) in case.held:
            expert_weight = stack[expert - case.held.start].dequantize()
            expected[token, slot] = gate_up_reference(x[token], expert_weight)
    if shared is not None:
        expected[:, -1] = gate_up_reference(x, shared.dequantize())
    return activation_order.from_fragment_order(actual).cpu(), expected


def assert_gate_up(actual: Tensor, expected: Tensor, max_error: float, rms_error: float) -> None:
    """Rows of experts elsewhere are as they were, columns of padding are zeros."""
    is_held = ~expected[:, :, 0].isnan()
    width = expected.shape[2]
    assert actual[~is_held].isnan().all()
    assert not actual[is_held][:, width:].any()
    assert_close(actual[is_held][:, :width], expected[is_held], max_error=max_error, rms_error=rms_error)


def down_of(
    x: Tensor,
    ids: Tensor,
    case: Experts,
    form: Form,
    launch: ExpertDecodeLaunch,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and float64 [T, N], of x [T, slots, I]; slots not to be read are NaN."""
    (stack, shared), weights = case.weights(form, case.num_outputs), normal(*ids.shape).abs()
    x = x.clone()
    expected = torch.zeros(len(ids), case.num_outputs, dtype=torch.float64)
    for token, slot in (ids.cpu() >= 0).nonzero().tolist():
        if (expert := int(ids[token, slot])) in case.held:
            product = product_reference(x[token, slot], stack[expert - case.held.start].dequantize())
            expected[token] += product * float(weights[token, slot])
        else:
            x[token, slot] = torch.nan
    if shared is not None:
        expected += product_reference(x[:, -1], shared.dequantize())
    held = packed(stack, form), packed(shared, form), case.held.start
    actual = expert_down(in_slots(x), ids, weights, *held, dtype, launch=launch)
    return actual, expected


def in_slots(x: Tensor) -> Tensor:
    """x [T, slots, I] in fragment order, contiguous, as `expert_gate_up` leaves it."""
    return in_fragment_order(x).contiguous()


def down_input(case: Experts) -> Tensor:
    return normal(case.num_tokens, case.top_k + case.has_shared, case.num_inputs)


def down_launch(case: Experts, block_rows: int) -> ExpertDecodeLaunch:
    launch = expert_down_launch(case.num_tokens, case.top_k, case.num_outputs, ARCHES[0])
    return replace(launch, block_rows=block_rows)


@pytest.mark.parametrize(("case", "form"), CASES_WITH_FORMS)
def test_gate_up(case: Experts, form: Form) -> None:
    actual, expected = gate_up_of(normal(case.num_tokens, case.num_inputs), case.ids(), case, form, NARROW)
    assert_gate_up(actual, expected, max_error=1e-5, rms_error=1e-6)


@pytest.mark.parametrize(("case", "form"), CASES_WITH_FORMS)
def test_down(case: Experts, form: Form) -> None:
    actual, expected = down_of(down_input(case), case.ids(), case, form, down_launch(case, 32))
    assert_close(actual, expected, max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("case", [CASES["all-held"], CASES["part-held"]], ids=["all-held", "part-held"])
def test_larger_blocks(case: Experts) -> None:
    form, x = FORMS[0], normal(case.num_tokens, case.num_inputs)
    assert_gate_up(*gate_up_of(x, case.ids(), case, form, WIDE), max_error=1e-5, rms_error=1e-6)
    actual, expected = down_of(down_input(case), case.ids(), case, form, down_launch(case, 64))
    assert_close(actual, expected, max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("num_outputs", [1, 40, 70])
@pytest.mark.parametrize("has_shared", [False, True])
def test_down_to_any_number_of_rows(has_shared: bool, num_outputs: int) -> None:
    case = replace(ALL_HELD, num_outputs=num_outputs, has_shared=has_shared)
    actual, expected = down_of(down_input(case), case.ids(), case, FORMS[0], down_launch(case, 32))
    assert_close(actual, expected, max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("num_inputs", [64, 192, 320])
def test_down_from_any_width(num_inputs: int) -> None:
    case = replace(ALL_HELD, num_inputs=num_inputs)
    actual, expected = down_of(down_input(case), case.ids(), case, FORMS[0], down_launch(case, 32))
    assert_close(actual, expected, max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sixteen_bit_activations(form: Form) -> None:
    dtype = torch.float16 if form.is_float16 else torch.bfloat16
    x = normal(ALL_HELD.num_tokens, ALL_HELD.num_inputs).to(dtype)
    pair = gate_up_of(x, ALL_HELD.ids(), ALL_HELD, form, NARROW, dtype)
    assert_gate_up(*pair, max_error=3e-2, rms_error=3e-3)
    x = down_input(ALL_HELD).to(dtype)
    for out_dtype in (torch.bfloat16, torch.float32):
        pair = down_of(x, ALL_HELD.ids(), ALL_HELD, form, down_launch(ALL_HELD, 32), out_dtype)
        assert_close(*pair, max_error=2e-2, rms_error=3e-3)


def test_all_tokens_on_one_expert() -> None:
    case = replace(ALL_HELD, num_tokens=4, top_k=1, has_shared=False)
    ids = torch.full((4, 1), 5, dtype=torch.int32, device=DEVICE)
    x = normal(4, case.num_inputs)
    assert_gate_up(*gate_up_of(x, ids, case, FORMS[0], NARROW), max_error=1e-5, rms_error=1e-6)
    pair = down_of(down_input(case), ids, case, FORMS[0], down_launch(case, 32))
    assert_close(*pair, max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("has_shared", [False, True])
def test_no_expert_is_held(has_shared: bool) -> None:
    """Then only the shared one adds something."""
    case = replace(CASES["part-held"], num_experts=2, top_k=2, has_shared=has_shared)
    x = normal(case.num_tokens, case.num_inputs)
    pair = gate_up_of(x, case.ids(), case, FORMS[0], NARROW)
    assert_gate_up(*pair, max_error=1e-5, rms_error=1e-6)
    pair = down_of(down_input(case), case.ids(), case, FORMS[0], down_launch(case, 32))
    assert_close(*pair, max_error=5e-6, rms_error=1e-6)


def test_two_runs_are_equal() -> None:
    case, form = replace(ALL_HELD, held=range(1, 4), num_inputs=320), FORMS[0]
    x = normal(case.num_tokens, case.num_inputs)
    first, second = (gate_up_of(x, case.ids(), case, form, NARROW)[0] for _ in range(2))
    assert first.nan_to_num().equal(second.nan_to_num())
    launch = down_launch(case, 32)
    first, second = (down_of(down_input(case), case.ids(), case, form, launch)[0] for _ in range(2))
    assert first.equal(second)


def test_float16_activations_are_finite() -> None:
    """silu(gate) * up passes 65504 sooner than anything else in a model."""
    x = 200 * normal(ALL_HELD.num_tokens, ALL_HELD.num_inputs)
    form = FORMS[-1]
    actual, expected = gate_up_of(x, ALL_HELD.ids(), ALL_HELD, form, NARROW, torch.float16)
    assert (expected.abs() > 65504).any()
    assert_gate_up(actual, expected.clamp(-65504, 65504), max_error=1e-2, rms_error=3e-3)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_launches_are_possible(arch: int, shards: int) -> None:
    """GLM-4.7: a shard's experts have 1536 / shards neurons."""
    for num_tokens in range(1, MAX_TOKENS + 1):
        for top_k in (1, 3, 8):
            launch = expert_gate_up_launch(num_tokens * (top_k + 1), 5120, 1536 // shards, arch)
            assert launch.block_rows % 16 == 0 and launch.splits in (1, 2, 4, 8)
            launch = expert_down_launch(num_tokens, top_k, 5120, arch)
            assert launch.block_rows % 32 == 0  # halves of 16 for the shared expert
            assert launch.splits in (2, 4, 8) and launch.splits >= top_k
