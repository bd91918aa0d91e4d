"""Write a checkpoint of random weights with the full width of GLM-4.7, in the layout of nvidia/GLM-4.7-NVFP4.

    .venv/bin/python benchmarks/synthetic_checkpoint.py build/synthetic-checkpoint [--num-layers 2]

Every tensor has its true shape and dtype; there are only fewer layers, the first of them dense (2 layers:
5.9 GB). It loads and runs as the real one does, and its text means nothing. Tokenizer and chat template are
those of the demo checkpoint, which must be there (`scripts/demo` prepares it).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.engine.checkpoint.checkpoint_writer import CheckpointWriter
from nybble.engine.checkpoint.layouts import MODELOPT_NVFP4
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.parameters import Parameter, expected_parameters
from nybble.engine.checkpoint.quantize_recipe import QuantizeRecipe
from nybble.kernels.quantized_tensor import NVFP4, QuantizedTensor

CONFIG: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 151552,
    "hidden_size": 5120,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "max_position_embeddings": 202752,
    "hidden_act": "silu",
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}
_TEXTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_SHARD_BYTES = 1 << 30
_STANDARD_DEVIATION = 0.02  # of every matrix: GLM-4.7's initializer_range


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--texts", type=Path, default=Path("build/demo-checkpoint"))
    options = parser.parse_args()
    write_synthetic_checkpoint(options.directory, options.num_layers, options.texts)


def write_synthetic_checkpoint(directory: Path, num_layers: int, texts: Path) -> None:
    """`texts` is a checkpoint whose tokenizer and template are taken."""
    fields = CONFIG | {"num_hidden_layers": num_layers}
    config = ModelConfig.from_fields(fields)
    random = torch.Generator().manual_seed(0)
    with CheckpointWriter(directory, shard_bytes=_SHARD_BYTES) as writer:
        for parameter in expected_parameters(config):
            _write(writer, parameter, random)
        targets = {p.module: MODELOPT_NVFP4 for p in expected_parameters(config) if _is_quantized(p)}
        declaration = QuantizeRecipe("nvfp4").declaration(config, targets)
        writer.write_json("config.json", fields | {"quantization_config": declaration})
        for name in _TEXTS:
            writer.write_text(name, (texts / name).read_text(encoding="utf-8"))


def _write(writer: CheckpointWriter, parameter: Parameter, random: torch.Generator) -> None:
    if _is_quantized(parameter):
        rows, columns = parameter.shape
        writer.add_matrix(parameter.module, _random_nvfp4(rows, columns, random), MODELOPT_NVFP4)
        writer.add(f"{parameter.module}.input_scale", torch.tensor(1.0))
    elif "norm" in parameter.name:
        writer.add(parameter.name, torch.ones(parameter.shape, dtype=torch.bfloat16))
    elif parameter.name.endswith("e_score_correction_bias"):
        writer.add(parameter.name, torch.zeros(parameter.shape))
    else:
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16)
        writer.add(parameter.name, weight.normal_(0, _STANDARD_DEVIATION, generator=random))


def _is_quantized(parameter: Parameter) -> bool:
    return parameter.is_linear and ".mlp." in parameter.name


def _random_nvfp4(rows: int, columns: int, random: torch.Generator) -> QuantizedTensor:
    """Random codes and block scales; the global scale gives the weights their standard deviation."""

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=random)

    block_scales = draw(0x60, 0x78, rows, columns // 16).view(torch.float8_e4m3fn)  # 32 to 240
    # Root mean square of the 16 values of E2M1, and of those block scales.
    spread = 2.93 * float(block_scales.float().square().mean().sqrt())
    return QuantizedTensor(
        codes=draw(0, 256, rows, columns // 2),
        block_scales=block_scales,
        global_scales=torch.full((rows,), _STANDARD_DEVIATION / spread),
        format=NVFP4,
    )


if __name__ == "__main__":
    main()
