"""What a checkpoint says of its own quantization, checked against what its tensors are.

The tensors' dtypes decide how they are read (`layouts.py`). The declaration must not contradict them: a
quantized tensor in a layout that was not declared, or on the list of what stays float, means that the
files do not belong together. A float tensor that is not on that list is no contradiction: the lists name
Linear layers, and the router is none.

Declared in config.json under `quantization_config`, or in ModelOpt's older hf_quant_config.json.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nybble.engine.checkpoint.checkpoint import TensorEntry
from nybble.engine.checkpoint.layouts import (
    COMPRESSED_MXFP4,
    COMPRESSED_NVFP4,
    FLOATS,
    FP8_PER_CHANNEL,
    MODELOPT_NVFP4,
    QUARK_MXFP4,
    Layout,
    find_layout,
)
from nybble.engine.checkpoint.model_config import ModelConfig, read_json_object
from nybble.engine.checkpoint.parameters import expected_parameters
from nybble.engine.errors import CheckpointError, ConfigError

_MODELOPT = {"NVFP4": (MODELOPT_NVFP4,), "MIXED_PRECISION": (MODELOPT_NVFP4, FP8_PER_CHANNEL)}
_COMPRESSED = {
    "nvfp4-pack-quantized": (COMPRESSED_NVFP4,),
    "mxfp4-pack-quantized": (COMPRESSED_MXFP4,),
    "float-quantized": (FP8_PER_CHANNEL,),
    "mixed-precision": (COMPRESSED_NVFP4, COMPRESSED_MXFP4, FP8_PER_CHANNEL),
}


@dataclass(frozen=True)
class QuantizationConfig:
    """layouts: those that quantized matrices may be in; ignored: patterns of modules that stay float;
    has_fp8_kv_cache: whether keys and values are meant to be cached in FP8."""

    method: str
    layouts: tuple[Layout, ...]
    ignored: tuple[str, ...]
    has_fp8_kv_cache: bool = False

    def is_ignored(self, module: str) -> bool:
        return bool(self.ignored) and self._ignored.match(module) is not None

    @cached_property
    def _ignored(self) -> re.Pattern[str]:
        """All patterns in one: GLM-4.7 has 43,000 modules to hold against 180 of them."""
        return re.compile("|".join(map(_expression, self.ignored)))


def read_quantization_config(directory: Path) -> QuantizationConfig | None:
    """The declaration of a checkpoint directory, or None if it has none.

    Raises:
        ConfigError: it declares a method or algorithm that is not known.
    """
    fields = read_json_object(directory / "config.json").get("quantization_config")
    if isinstance(fields, dict):
        return _parse(fields)
    legacy = directory / "hf_quant_config.json"
    if not legacy.exists():
        return None
    quantization = read_json_object(legacy).get("quantization", {})
    excluded = quantization.get("exclude_modules", [])
    return _parse({"quant_method": "modelopt", "ignore": excluded} | quantization)


def check_quantization(
    declared: QuantizationConfig, config: ModelConfig, entries: Mapping[str, TensorEntry]
) -> None:
    """Raises CheckpointError naming the first tensor that contradicts the declaration."""
    for parameter in expected_parameters(config):
        layout = find_layout(parameter.module, entries) if parameter.is_linear else FLOATS
        if layout is FLOATS:
            continue
        entry = entries[f"{parameter.module}.{layout.codes}"]
        if layout not in declared.layouts:
            names = " or ".join(each.name for each in declared.layouts)
            raise CheckpointError(
                f"{entry}: is {layout.name}, but the quantization config ({declared.method}) declares {names}"
            )
        if declared.is_ignored(parameter.module):
            raise CheckpointError(
                f"{entry}: is {layout.name}, but the quantization config ({declared.method}) lists it among "
                "what stays float"
            )


def _parse(fields: dict[str, Any]) -> QuantizationConfig:
    method = fields.get("quant_method")
    parsers: dict[object, Callable[[dict[str, Any]], QuantizationConfig]] = {
        "modelopt": _parse_modelopt,
        "compressed-tensors": _parse_compressed,
        "quark": _parse_quark,
    }
    if method not in parsers:
        raise ConfigError(
            f"quantization config: quant_method {method!r} is not one of {', '.join(map(str, parsers))}"
        )
    return parsers[method](fields)


def _parse_modelopt(fields: dict[str, Any]) -> QuantizationConfig:
    layouts = _choose("quant_algo", fields.get("quant_algo"), _MODELOPT)
    has_fp8_kv_cache = fields.get("kv_cache_quant_algo") == "FP8" or _is_fp8_scheme(fields)
    return QuantizationConfig("modelopt", layouts, _patterns(fields, "ignore"), has_fp8_kv_cache)


def _parse_compressed(fields: dict[str, Any]) -> QuantizationConfig:
    layouts = _choose("format", fields.get("format"), _COMPRESSED)
    ignored, has_fp8_kv_cache = _patterns(fields, "ignore"), _is_fp8_scheme(fields)
    return QuantizationConfig("compressed-tensors", layouts, ignored, has_fp8_kv_cache)


def _parse_quark(fields: dict[str, Any]) -> QuantizationConfig:
    weight = (fields.get("global_quant_config") or {}).get("weight") or {}
    if (weight.get("dtype"), weight.get("group_size"), weight.get("scale_format")) != ("fp4", 32, "e8m0"):
        raise ConfigError(
            "quantization config: global_quant_config.weight is not fp4 in groups of 32 with e8m0 scales, "
            f"the only supported kind, but {weight!r}"
        )
    return QuantizationConfig("quark", (QUARK_MXFP4,), _patterns(fields, "exclude"))


def _is_fp8_scheme(fields: dict[str, Any]) -> bool:
    """Whether `kv_cache_scheme` is FP8 with one scale a tensor. Other kinds are cached as floats."""
    scheme = fields.get("kv_cache_scheme")
    if not isinstance(scheme, dict):
        return False
    kind = scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy", "tensor")
    return kind == (8, "float", "tensor")


def _choose(name: str, value: object, known: Mapping[str, tuple[Layout, ...]]) -> tuple[Layout, ...]:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"quantization config: {name} {value!r} is not one of {', '.join(known)}")
    return known[value]


def _patterns(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    patterns = fields.get(name) or []
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        raise ConfigError(f"quantization config: {name} is {patterns!r}, expected a list of module names")
    return tuple(patterns)


def _expression(pattern: str) -> str:
    """A name, a shell pattern (ModelOpt, Quark) or `re:` and a regular expression (compressed-tensors)."""
    if not pattern.startswith("re:"):
        return fnmatch.translate(pattern)
    try:
        return f"(?:{re.compile(pattern.removeprefix('re:')).pattern})"
    except re.error as error:
        raise ConfigError(f"quantization config: {pattern!r} is not a pattern: {error}") from error
