"""Which matrices of a checkpoint are quantized to what, and how the result declares it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nybble.engine.checkpoint.layouts import (
    COMPRESSED_MXFP4,
    FLOATS,
    FP8_PER_CHANNEL,
    MODELOPT_NVFP4,
    Layout,
)
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.parameters import expected_parameters
from nybble.engine.errors import OptionError
from nybble.engine.planning.inventory import find_part

_CLASSES = frozenset({"attention", "dense MLP", "routed experts", "shared experts"})


@dataclass(frozen=True)
class QuantizeRecipe:
    """format: of MLPs and experts; attention: of the attention projections."""

    format: Literal["nvfp4", "mxfp4"]
    attention: Literal["bf16", "fp8", "nvfp4"] = "bf16"

    def __post_init__(self) -> None:
        if self.format == "mxfp4" and self.attention == "nvfp4":
            raise OptionError(
                "attention in nvfp4 goes with format nvfp4: no published layout mixes it with mxfp4"
            )

    def target(self, module: str) -> Layout:
        """The layout in which a linear module is to be stored; FLOATS if it stays as it is."""
        if tensor_class(module) != "attention":
            return MODELOPT_NVFP4 if self.format == "nvfp4" else COMPRESSED_MXFP4
        return {"bf16": FLOATS, "fp8": FP8_PER_CHANNEL, "nvfp4": MODELOPT_NVFP4}[self.attention]

    def declaration(self, config: ModelConfig, targets: Mapping[str, Layout]) -> dict[str, Any]:
        """`quantization_config` of the result, as ModelOpt or compressed-tensors write it.

        `targets` holds the layout of every module that is quantized.
        """
        kept = sorted(
            parameter.module
            for parameter in expected_parameters(config)
            if parameter.is_linear and parameter.module not in targets
        )
        first_draft = config.num_hidden_layers
        drafts = range(first_draft, first_draft + config.num_nextn_predict_layers)
        if self.format == "nvfp4":
            ignore = [*kept, *(f"model.layers.{layer}*" for layer in drafts)]
            return _modelopt_declaration(self, targets, ignore)
        ignore = [*kept, *(rf"re:model\.layers\.{layer}\..*" for layer in drafts)]
        return _compressed_declaration(self, ignore)


def tensor_class(module: str) -> str | None:
    """Which class of the report a linear module belongs to; None if it is never quantized."""
    part = find_part(module)
    return part if part in _CLASSES and module.endswith("_proj") else None


def _modelopt_declaration(
    recipe: QuantizeRecipe, targets: Mapping[str, Layout], ignore: list[str]
) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    declaration: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignore}
    if recipe.attention != "fp8":
        return declaration | {"config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}}
    algorithms = {
        FP8_PER_CHANNEL.name: {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        MODELOPT_NVFP4.name: {"quant_algo": "NVFP4", "group_size": 16},
    }
    layers = {module: algorithms[layout.name] for module, layout in sorted(targets.items())}
    return declaration | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


def _compressed_declaration(recipe: QuantizeRecipe, ignore: list[str]) -> dict[str, Any]:
    groups: dict[str, Any] = {
        "group_0": {
            "format": "mxfp4-pack-quantized",
            "targets": ["re:.*mlp.*_proj$"],
            "weights": {
                "num_bits": 4,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
                "symmetric": True,
            },
        }
    }
    if recipe.attention == "fp8":
        groups["group_1"] = {
            "format": "float-quantized",
            "targets": ["re:.*self_attn.*_proj$"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(groups) > 1 else "mxfp4-pack-quantized",
        "config_groups": groups,
        "ignore": ignore,
    }
