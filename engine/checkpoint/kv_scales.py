"""By what an FP8 KV cache is scaled, as a checkpoint has it: a number for keys and one for values a layer.

ModelOpt stores `self_attn.k_proj.k_scale` and `self_attn.v_proj.v_scale`, compressed-tensors
`self_attn.k_scale` and `self_attn.v_scale`. What is missing is 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.parameters import kv_scale_names
from nybble.engine.errors import CheckpointError


@dataclass(frozen=True)
class KVScales:
    """Of one layer. What is stored is multiplied by it to get a key or value."""

    key: float = 1.0
    value: float = 1.0


def read_kv_scales(checkpoint: Checkpoint, layers: Iterable[int]) -> tuple[KVScales, ...]:
    """The scales of each of `layers`.

    Raises:
        CheckpointError: a scale is not a positive finite number, or its file cannot be read.
    """
    return tuple(
        KVScales(*(_read(checkpoint, f"model.layers.{layer}.self_attn", letter) for letter in "kv"))
        for layer in layers
    )


def _read(checkpoint: Checkpoint, attention: str, letter: str) -> float:
    for name in kv_scale_names(attention, letter):
        if name in checkpoint.entries:
            scale = float(checkpoint.read(name).float())
            if not 0 < scale < float("inf"):  # NaN fails this too
                raise CheckpointError(f"{checkpoint.entries[name]}: is {scale}, expected a positive number")
            return scale
    return 1.0
