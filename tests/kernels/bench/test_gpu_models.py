"""The GPUs that times are modelled for."""

from __future__ import annotations

import pytest

from nybble.engine.planning.gpu_specs import KNOWN_GPUS
from nybble.kernels.bench.gpu_models import GPU_MODELS, GpuModel, find_gpu_model
from nybble.kernels.compiled.resource_check import ARCHES


@pytest.mark.parametrize("model", GPU_MODELS, ids=lambda model: model.name)
def test_bandwidth_is_the_one_that_capacity_is_planned_with(model: GpuModel) -> None:
    (spec,) = (spec for spec in KNOWN_GPUS if spec.name == model.name)
    assert model.bandwidth_tbps == spec.bandwidth_tbps
    assert model.arch in ARCHES


@pytest.mark.parametrize("model", GPU_MODELS, ids=lambda model: model.name)
def test_the_clock_gives_the_peak(model: GpuModel) -> None:
    """Products of a multiprocessor in a cycle are a power of two on every one of these."""
    flops = model.bf16_tflops * 1e12 / (model.multiprocessors * model.clock_ghz * 1e9)
    assert min(abs(flops / 2**power - 1) for power in range(8, 15)) < 0.02


@pytest.mark.parametrize(
    ("name", "found"), [("H100", "H100 80GB"), ("h100 80gb", "H100 80GB"), ("rtx-pro_6000", "RTX PRO 6000")]
)
def test_names(name: str, found: str) -> None:
    assert find_gpu_model(name).name == found


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="GPU 'TPU' is not known; known are A100 80GB, H100 80GB"):
        find_gpu_model("TPU")


def test_issue_rate_of_an_h100() -> None:
    """5.0 instructions for each NVFP4 weight that arrives, as facts/kernels.md has it at a lower clock."""
    model = find_gpu_model("H100")
    weights_per_second = model.bandwidth_tbps * 1e12 / 0.5625
    assert model.instructions_per_second / weights_per_second == pytest.approx(5.2, abs=0.1)
