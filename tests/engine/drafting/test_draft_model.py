"""The draft layer against transformers' `MtpModel`, guess by guess."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from draft_oracle import DraftOracle
from running import random_prompt
from safetensors.torch import load_file, save_file
from tiny_glm import VARIANTS, make_checkpoint
from torch import Tensor
from transformers import Glm4MoeForCausalLM

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.weight_dtypes import WeightDtypes
from nybble.engine.drafting.draft_model import DraftModel
from nybble.engine.errors import CheckpointError
from nybble.engine.messages import SamplingParams
from nybble.engine.model.model import Glm4Moe
from nybble.engine.model.weights import ModelWeights, load_weights
from nybble.engine.scheduling.step import Chunk, StepInput, StepPlan, build_step_input
from nybble.kernels import nvfp4
from nybble.kernels.ops import KVCacheLayer, MoeWeights
from nybble.kernels.reference_ops import ReferenceOps

BLOCK_SIZE = 16
DEPTH = 4
Variant = tuple[Path, Glm4MoeForCausalLM]
CPU = torch.device("cpu")
BLOCKS = list(range(9, -1, -1))


@dataclass(frozen=True)
class Drafting:
    """Main model and draft layer of a checkpoint, over one sequence."""

    main: Glm4Moe[Tensor]
    draft: DraftModel[Tensor]
    caches: tuple[KVCacheLayer, ...]  # the last one is the draft layer's

    def hidden(self, token_ids: list[int]) -> Tensor:
        step = step_of(token_ids, 0)
        embedded = self.main.embed(step.token_ids)
        hidden = self.main.forward(embedded, step.positions, self.caches[:-1], step.attention)
        return self.main.normed(hidden)

    def rows(self, next_token_ids: list[int], start: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and what the next row takes, of rows from `start` on."""
        step = step_of(next_token_ids, start)
        output, normed = self.draft.forward(
            step.token_ids, hidden, step.positions, self.caches[-1], step.attention
        )
        return self.draft.logits(output), normed


def step_of(token_ids: list[int], start: int) -> StepInput:
    chunk = Chunk("a", token_ids, start, BLOCKS, SamplingParams(max_tokens=1))
    return build_step_input(StepPlan((chunk,)), BLOCK_SIZE)


def load(directory: Path) -> tuple[ModelWeights[Tensor], Drafting]:
    config, ops = ModelConfig.from_directory(directory), ReferenceOps(torch.float32)
    weights = load_weights(Checkpoint.open(directory), config, ops, CPU, torch.float32, with_draft=True)
    assert weights.draft is not None
    main = Glm4Moe(config, weights, ops, CPU)
    caches = []
    for _ in range(config.num_hidden_layers + 1):
        shape = len(BLOCKS), BLOCK_SIZE, config.num_key_value_heads, config.head_dim
        cache = ops.new_kv_cache(*shape, ops.dtype, CPU)
        cache.keys.fill_(torch.nan)  # what was never written must never be read
        cache.values.fill_(torch.nan)
        caches.append(cache)
    return weights, Drafting(main, DraftModel(weights.draft, ops, main), tuple(caches))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    directory = tmp_path_factory.mktemp(request.param)
    return directory, make_checkpoint(directory, seed=3, num_mtp_layers=1, **VARIANTS[request.param])


@torch.inference_mode()
def test_guesses_are_transformers(variant: Variant) -> None:
    """The next token's, and of a chain as deep as can be asked for: depth 1 to 4."""
    directory, main = variant
    _, drafting = load(directory)
    token_ids = list(random_prompt(53, seed=4))
    hidden = drafting.hidden(token_ids[:-1])
    expected = DraftOracle(directory, main).logits(token_ids, DEPTH)
    logits, normed = drafting.rows(token_ids[1:], 0, hidden)
    for depth in range(DEPTH):
        error = (logits[-1] - expected[depth]).abs().max()
        assert error <= 1e-4 * expected[depth].abs().max(), depth
        guess = int(logits[-1].argmax())
        logits, normed = drafting.rows([guess], len(token_ids) - 1 + depth, normed[-1:])


@torch.inference_mode()
def test_rows_may_come_in_chunks_and_be_written_again(variant: Variant) -> None:
    """What guesses left in the cache is gone once the rows of the tokens that came lie there."""
    directory, _ = variant
    _, drafting = load(directory)
    token_ids = list(random_prompt(40, seed=5))
    hidden = drafting.hidden(token_ids[:-1])
    whole, _ = drafting.rows(token_ids[1:], 0, hidden)
    _, drafting = load(directory)
    drafting.hidden(token_ids[:-1])
    parts = []
    for start, stop in ((0, 17), (17, 18), (18, 39)):
        logits, normed = drafting.rows(token_ids[start + 1 : stop + 1], start, hidden[start:stop])
        parts.append(logits)
        for ahead in range(3):  # guesses that are not to be
            _, normed = drafting.rows([9 + ahead], stop + ahead, normed[-1:])
    assert (torch.cat(parts) - whole).abs().max() <= 1e-4 * whole.abs().max()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path, seed=6, num_mtp_layers=1)
    return tmp_path


def change(directory: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of the draft layer by name, dots as two underscores; None leaves one out."""
    file = directory / "model.safetensors"
    stored = load_file(file)
    for name, tensor in tensors.items():
        full = f"model.layers.3.{name.replace('__', '.')}.weight"
        del stored[full]
        if tensor is not None:
            stored[full] = tensor
    save_file(stored, file, {"format": "pt"})


def test_copies_of_embedding_and_head_are_not_held_twice(checkpoint: Path) -> None:
    weights, _ = load(checkpoint)
    assert weights.draft is not None and weights.head is not None
    assert weights.draft.embedding is weights.embedding
    assert weights.draft.head.matrix is weights.head.matrix
    assert weights.draft.head.norm is not weights.head.norm


def test_copies_may_be_left_out(checkpoint: Path) -> None:
    change(checkpoint, embed_tokens=None, shared_head__head=None)
    weights, _ = load(checkpoint)
    assert weights.draft is not None and weights.head is not None
    assert weights.draft.embedding is weights.embedding
    assert weights.draft.head.matrix is weights.head.matrix


def test_what_is_no_copy_is_loaded(checkpoint: Path) -> None:
    embedding, head = torch.randn(160, 64), torch.randn(160, 64)
    change(checkpoint, embed_tokens=embedding, shared_head__head=head)
    weights, _ = load(checkpoint)
    assert weights.draft is not None
    assert torch.equal(weights.draft.embedding.table, embedding)
    assert torch.equal(weights.draft.head.matrix, head)


def test_an_incomplete_draft_layer_is_refused_only_if_it_is_wanted(checkpoint: Path) -> None:
    change(checkpoint, eh_proj=None)
    config, ops = ModelConfig.from_directory(checkpoint), ReferenceOps(torch.float32)
    load_weights(Checkpoint.open(checkpoint), config, ops, CPU, torch.float32)
    with pytest.raises(CheckpointError, match="lacks tensors"):
        load(checkpoint)


@torch.inference_mode()
def test_routed_experts_can_be_requantized_and_nothing_else(tmp_path: Path) -> None:
    """NVFP4 as `nvfp4` makes it; the main model's stay as they are."""
    make_checkpoint(tmp_path, seed=8, num_mtp_layers=1)
    config, ops = ModelConfig.from_directory(tmp_path), ReferenceOps(torch.float32)
    stored, _ = load(tmp_path)
    recast = load_weights(
        Checkpoint.open(tmp_path),
        config,
        ops,
        CPU,
        torch.float32,
        WeightDtypes(draft_expert_dtype="nvfp4"),
        with_draft=True,
    )
    assert stored.draft is not None and recast.draft is not None
    before, after = stored.draft.layer.feed_forward, recast.draft.layer.feed_forward
    assert isinstance(before, MoeWeights) and isinstance(after, MoeWeights)
    for expert, down in enumerate(before.experts.down):
        assert torch.equal(after.experts.down[expert], nvfp4.quantize(down).dequantize())
    assert torch.equal(before.shared_expert.down, after.shared_expert.down)
    assert torch.equal(before.router.weight, after.router.weight)
    for one, other in zip(stored.layers[1:], recast.layers[1:], strict=True):
        assert isinstance(one.feed_forward, MoeWeights) and isinstance(other.feed_forward, MoeWeights)
        assert torch.equal(one.feed_forward.experts.down, other.feed_forward.experts.down)
