"""Is a checkpoint complete, sane in its numbers, and does it compute?

`check_structure` reads headers only; `find_bad_numbers` reads every tensor once; `self_test` runs the first
layers, up to the first sparse one, in bfloat16 and in float32, which must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.matrix_reader import read_matrix
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.parameters import Parameter, check_tensors, expected_parameters, layer_of
from nybble.engine.checkpoint.quantization_config import check_quantization, read_quantization_config
from nybble.engine.errors import CheckpointError
from nybble.engine.messages import SamplingParams
from nybble.engine.model.kv_cache import CacheGeometry, allocate_kv_cache
from nybble.engine.model.model import Glm4Moe
from nybble.engine.model.weights import load_weights
from nybble.engine.planning.placement import Placement
from nybble.engine.scheduling.step import Chunk, StepPlan, build_step_input
from nybble.kernels.quantized_tensor import QuantizedTensor
from nybble.kernels.reference_ops import ReferenceOps

# bfloat16 against float32 over two layers is off by about 0.5 % on sound weights.
MAX_SELF_TEST_ERROR = 0.05
_NUM_TOKENS = 32
_CPU = torch.device("cpu")


def check_structure(directory: Path) -> tuple[ModelConfig, Checkpoint]:
    """Raises CheckpointError naming file and tensor if anything is missing, left over or contradictory."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory")
    config = ModelConfig.from_directory(directory)
    checkpoint = Checkpoint.open(directory)
    check_tensors(config, checkpoint.entries)
    declared = read_quantization_config(directory)
    if declared is not None:
        check_quantization(declared, config, checkpoint.entries)
    return config, checkpoint


def find_bad_numbers(
    config: ModelConfig, checkpoint: Checkpoint, on_parameter: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """Yields a line for each parameter whose numbers cannot be meant: NaN, infinite, or zero scales."""
    for parameter in expected_parameters(config):
        try:
            problem = _problem(checkpoint, parameter)
        except CheckpointError as error:
            yield str(error)
        else:
            if problem:
                yield f"{parameter.module}: {problem}"
        on_parameter()


def self_test(config: ModelConfig, checkpoint: Checkpoint) -> float:
    """Relative error of bfloat16 hidden states against float32, over the dense layers and one sparse one.

    The median over tokens: where two experts nearly tie, rounding may choose the other one.

    Raises:
        CheckpointError: they are not finite, or differ by more than `MAX_SELF_TEST_ERROR`.
    """
    num_layers = min(config.first_k_dense_replace + 1, config.num_hidden_layers)
    first = replace(config, num_hidden_layers=num_layers, num_nextn_predict_layers=0)
    names = {name for name in checkpoint.entries if (layer_of(name) or 0) < num_layers}
    part = Checkpoint(checkpoint.directory, {name: checkpoint.entries[name] for name in names})
    expected, actual = (_hidden(first, part, dtype) for dtype in (torch.float32, torch.bfloat16))
    error = float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
    if not error <= MAX_SELF_TEST_ERROR:  # NaN fails this too
        raise CheckpointError(
            f"self-test: the first {num_layers} layers differ by {error:.3g} between bfloat16 and float32, "
            f"expected at most {MAX_SELF_TEST_ERROR}"
        )
    return error


def _problem(checkpoint: Checkpoint, parameter: Parameter) -> str | None:
    if not parameter.is_linear:
        weight: Tensor | QuantizedTensor = checkpoint.read(parameter.name)
    else:
        weight = read_matrix(checkpoint, parameter.module)  # refuses NaN and negative scales
    if isinstance(weight, QuantizedTensor):
        num_zero = int((weight.scales() == 0).sum())
        has_nan = weight.format.bits == 8 and not weight.codes.float().isfinite().all()
        return "a code is NaN" if has_nan else f"{num_zero} scales are zero" if num_zero else None
    return None if weight.isfinite().all() else "holds NaN or infinity"


@torch.inference_mode()
def _hidden(config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> Tensor:
    """float32 hidden states [_NUM_TOKENS, H] of fixed random tokens."""
    ops = ReferenceOps(dtype)
    weights = load_weights(checkpoint, config, ops, _CPU, dtype)
    model = Glm4Moe(config, weights, ops, _CPU)
    geometry = CacheGeometry.of(config, Placement(), dtype, block_size=_NUM_TOKENS, num_blocks=1)
    random = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, config.vocab_size, (_NUM_TOKENS,), generator=random).tolist()
    plan = StepPlan((Chunk("self-test", token_ids, 0, [0], SamplingParams(max_tokens=1)),))
    step = build_step_input(plan, _NUM_TOKENS)
    cache = allocate_kv_cache(geometry, ops, _CPU)
    return model.forward(model.embed(step.token_ids), step.positions, cache, step.attention).float()
