"""Re-quantizing weights while they are loaded.

nvidia/GLM-4.7-NVFP4 keeps attention in BF16, which is two thirds of what decoding reads at batch 1: 37.7 GB a
token. In FP8 it is about 25.

Its draft (MTP) layer is in BF16 too; a backend that has kernels for FP4 experts only wants those in NVFP4.
They only guess, so that no token changes.

Each rank re-quantizes what it holds of a matrix, with scales of its own, at least as fine as those of the
whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nybble.kernels import fp8, nvfp4
from nybble.kernels.quantized_tensor import QuantizedTensor

WeightDtype = Literal["stored", "bf16", "fp8", "nvfp4"]


@dataclass(frozen=True, kw_only=True)
class WeightDtypes:
    """In what form each class of matrices is held; "stored" leaves it as the checkpoint has it."""

    attention_dtype: WeightDtype = field(
        default="stored", metadata={"help": "re-quantize attention projections while loading"}
    )
    dense_mlp_dtype: WeightDtype = field(
        default="stored", metadata={"help": "re-quantize the MLPs of dense layers while loading"}
    )
    shared_expert_dtype: WeightDtype = field(
        default="stored", metadata={"help": "re-quantize shared experts while loading"}
    )
    draft_expert_dtype: Literal["stored", "nvfp4"] = field(
        default="stored", metadata={"help": "re-quantize the MTP layer's routed experts while loading"}
    )


def recast(weight: Tensor | QuantizedTensor, dtype: WeightDtype) -> Tensor | QuantizedTensor:
    """`weight`, a matrix [rows, columns], in another form. What has that form already is not touched."""
    if dtype == "stored" or _has_form(weight, dtype):
        return weight
    floats = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    if dtype == "bf16":
        return floats.to(torch.bfloat16)
    return fp8.quantize(floats) if dtype == "fp8" else nvfp4.quantize(floats)


def _has_form(weight: Tensor | QuantizedTensor, dtype: WeightDtype) -> bool:
    if isinstance(weight, Tensor):
        return dtype == "bf16" and weight.dtype == torch.bfloat16
    return weight.format.name.startswith(dtype)
