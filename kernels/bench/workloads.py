"""From a benchmark case to something that runs."""

from __future__ import annotations

import torch

from nybble.kernels.bench.attention_workloads import attention_workload
from nybble.kernels.bench.cases import LINEAR_OPS, BenchCase, ModelShape
from nybble.kernels.bench.expert_workloads import expert_workload
from nybble.kernels.bench.inputs import BenchInputs
from nybble.kernels.bench.layer_workloads import (
    norm_workload,
    router_workload,
    sampling_workload,
    store_qkv_workload,
)
from nybble.kernels.bench.linear_workloads import linear_workload
from nybble.kernels.bench.workload import Workload


def make_workload(case: BenchCase, model: ModelShape, inputs: BenchInputs) -> Workload:
    """Raises ValueError where kernels for `inputs.arch` cannot do it, as an FP8 cache below 9.0."""
    if case.op in LINEAR_OPS:
        return linear_workload(case, model, inputs)
    make = {
        "experts": expert_workload,
        "router": router_workload,
        "attention": attention_workload,
        "prefill_attention": attention_workload,
        "norm": norm_workload,
        "store_qkv": store_qkv_workload,
        "sampling": sampling_workload,
    }[case.op]
    return make(case, model, inputs)


def meta_workload(case: BenchCase, model: ModelShape, arch: int) -> Workload:
    """With shapes only: its launches can be recorded and compiled, on any machine."""
    return make_workload(case, model, BenchInputs(torch.device("meta"), arch))
