"""From checkpoint to a rank's model weights, one layer at a time.

Fused matrices (q/k/v, gate/up) and the stacks of experts are read to where they belong, in FP4 without
touching a code. Only where their parts are stored differently, or re-quantized, are they read one by one
and then joined. Peak memory beyond the finished weights is that of the largest stack as stored (gate and up
of a layer's experts), for a backend that keeps another form, and float32 copies of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor

from nybble.engine.checkpoint.checkpoint import Checkpoint, Span
from nybble.engine.checkpoint.matrix_reader import Part, is_uniform, read_matrix, read_stack
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.parameters import all_parameters, check_draft_tensors, check_tensors
from nybble.engine.checkpoint.weight_dtypes import WeightDtype, WeightDtypes, recast
from nybble.engine.planning.placement import Placement
from nybble.kernels import quantized_tensor
from nybble.kernels.ops import (
    AttentionShape,
    AttentionWeights,
    DenseWeights,
    Embedding,
    MlpWeights,
    MoeWeights,
    Ops,
    RmsNorm,
    RouterWeights,
    W,
)
from nybble.kernels.quantized_tensor import QuantizedTensor

Stored = Tensor | QuantizedTensor

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class LayerWeights(Generic[W]):
    attention: AttentionWeights[W]
    feed_forward: DenseWeights[W] | MoeWeights[W]


@dataclass(frozen=True)
class HeadWeights(Generic[W]):
    """norm: the last one; matrix: [V, H] in the backend's form."""

    norm: RmsNorm
    matrix: W


@dataclass(frozen=True)
class DraftWeights(Generic[W]):
    """The draft (MTP) layer. projection: [H, 2H], the first H columns for the normed embedding, the others
    for the normed hidden states; head: its last norm, and the matrix."""

    embedding: Embedding
    embedding_norm: RmsNorm
    hidden_norm: RmsNorm
    projection: W
    layer: LayerWeights[W]
    head: HeadWeights[W]


@dataclass(frozen=True)
class ModelWeights(Generic[W]):
    """What a rank holds: `embedding` only on the first pipeline stage, `head` only on the last, `draft` only
    if it was asked for."""

    embedding: Embedding | None
    layers: tuple[LayerWeights[W], ...]
    head: HeadWeights[W] | None
    draft: DraftWeights[W] | None = None


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    ops: Ops[W],
    device: torch.device,
    dtype: torch.dtype,
    weight_dtypes: WeightDtypes | None = None,
    placement: Placement | None = None,
    on_layer: Callable[[int], None] = lambda layer: None,
    with_draft: bool = False,
) -> ModelWeights[W]:
    """Load what a rank holds of the main model, by default all of it, and of the draft layer if `with_draft`.

    `ops` is the backend, `dtype` that of activations; `on_layer` is told after each layer.

    Raises:
        CheckpointError: as `check_tensors` and `check_draft_tensors`, or a file cannot be read.
    """
    check_tensors(config, checkpoint.entries)
    if with_draft:
        check_draft_tensors(config, checkpoint.entries)
    placement = placement or Placement()
    loader = _Loader(
        checkpoint=checkpoint,
        config=config,
        ops=ops,
        device=device,
        dtype=dtype,
        weight_dtypes=weight_dtypes or WeightDtypes(),
        placement=placement,
        spans={parameter.name: placement.span(parameter) for parameter in all_parameters(config)},
    )
    weights = loader.load(on_layer)
    return replace(weights, draft=loader.load_draft(weights)) if with_draft else weights


@dataclass(frozen=True, kw_only=True)
class _Loader(Generic[W]):
    checkpoint: Checkpoint
    config: ModelConfig
    ops: Ops[W]
    device: torch.device
    dtype: torch.dtype
    weight_dtypes: WeightDtypes
    placement: Placement
    spans: Mapping[str, Span | None]  # of each parameter, on this rank

    def load(self, on_layer: Callable[[int], None]) -> ModelWeights[W]:
        embedding = self._embedding() if self.placement.is_first_stage else None
        layers = []
        for layer in self.placement.layers(self.config.num_hidden_layers):
            layers.append(self._layer(layer))
            on_layer(layer)
        head = self._head(embedding) if self.placement.is_last_stage else None
        return ModelWeights(embedding=embedding, layers=tuple(layers), head=head)

    def load_draft(self, main: ModelWeights[W]) -> DraftWeights[W]:
        """The draft layer, which shares embedding and head with the main model where they are equal."""
        number = self.config.num_hidden_layers
        prefix = f"model.layers.{number}"
        return DraftWeights(
            embedding=self._draft_embedding(f"{prefix}.embed_tokens.weight", main.embedding),
            embedding_norm=self._norm(f"{prefix}.enorm"),
            hidden_norm=self._norm(f"{prefix}.hnorm"),
            projection=self.ops.prepare_weight(self._stored(f"{prefix}.eh_proj")),
            layer=self._layer(number),
            head=HeadWeights(
                norm=self._norm(f"{prefix}.shared_head.norm"),
                matrix=self._draft_head(f"{prefix}.shared_head.head", main.head),
            ),
        )

    def _draft_embedding(self, name: str, main: Embedding | None) -> Embedding:
        if main is not None and self._is_shared(name, _EMBEDDING):
            return main
        return self._embedding(name if name in self.checkpoint.entries else _EMBEDDING)

    def _draft_head(self, name: str, main: HeadWeights[W] | None) -> W:
        original = _EMBEDDING if self.config.tie_word_embeddings else "lm_head.weight"
        if main is not None and self._is_shared(f"{name}.weight", original):
            return main.matrix
        return self.ops.prepare_weight(self._stored(name))

    def _is_shared(self, name: str, original: str) -> bool:
        """Whether the files leave out tensor `name`, or have in it, on this rank, the bytes of `original`."""
        entries = self.checkpoint.entries
        if name not in entries:
            return f"{name}_packed" not in entries
        return original in entries and self.checkpoint.is_copy(name, original, self.spans[name])

    def _embedding(self, name: str = _EMBEDDING) -> Embedding:
        span = self.spans[name]
        return Embedding(table=self._vector(name), first_id=span.start if span else 0)

    def _head(self, embedding: Embedding | None) -> HeadWeights[W]:
        norm = self._norm("model.norm")
        if not self.config.tie_word_embeddings:
            return HeadWeights(norm, self.ops.prepare_weight(self._stored("lm_head")))
        tied = embedding or self._embedding()
        return HeadWeights(norm, self.ops.prepare_weight(tied.table))

    def _layer(self, layer: int) -> LayerWeights[W]:
        prefix = f"model.layers.{layer}"
        is_dense, is_draft = self.config.is_dense_layer(layer), layer >= self.config.num_hidden_layers
        dtype = self.weight_dtypes.draft_expert_dtype if is_draft else "stored"
        return LayerWeights(
            attention=self._attention(prefix),
            feed_forward=self._dense(prefix) if is_dense else self._moe(prefix, dtype),
        )

    def _attention(self, prefix: str) -> AttentionWeights[W]:
        config, attention = self.config, f"{prefix}.self_attn"
        dtype = self.weight_dtypes.attention_dtype
        projections = [f"{attention}.{name}_proj" for name in "qkv"]
        biases = [self._vector(f"{name}.bias") for name in projections if config.attention_bias]
        return AttentionWeights(
            shape=self._attention_shape(),
            norm=self._norm(f"{prefix}.input_layernorm"),
            qkv=self.ops.prepare_weight(self._joined(projections, dtype)),
            qkv_bias=torch.cat(biases) if biases else None,
            query_norm=self._norm(f"{attention}.q_norm") if config.use_qk_norm else None,
            key_norm=self._norm(f"{attention}.k_norm") if config.use_qk_norm else None,
            output=self.ops.prepare_weight(self._stored(f"{attention}.o_proj", dtype)),
        )

    def _attention_shape(self) -> AttentionShape:
        config, placement = self.config, self.placement
        return AttentionShape(
            num_heads=len(placement.units(config.num_attention_heads)),
            num_kv_heads=len(placement.units(config.num_key_value_heads)),
            head_dim=config.head_dim,
            rotary_dim=config.rotary_dim,
        )

    def _dense(self, prefix: str) -> DenseWeights[W]:
        norm, dtype = self._norm(f"{prefix}.post_attention_layernorm"), self.weight_dtypes.dense_mlp_dtype
        return DenseWeights(norm=norm, mlp=self._mlp(f"{prefix}.mlp", dtype))

    def _moe(self, prefix: str, dtype: WeightDtype) -> MoeWeights[W]:
        """dtype: of the routed experts."""
        return MoeWeights(
            norm=self._norm(f"{prefix}.post_attention_layernorm"),
            router=self._router(f"{prefix}.mlp.gate"),
            experts=self._experts(f"{prefix}.mlp.experts", dtype),
            shared_expert=self._mlp(f"{prefix}.mlp.shared_experts", self.weight_dtypes.shared_expert_dtype),
            first_expert=self.placement.experts(self.config.n_routed_experts).start,
        )

    def _router(self, name: str) -> RouterWeights:
        config = self.config
        router = RouterWeights(
            weight=self._read(f"{name}.weight").float(),
            bias=self._read(f"{name}.e_score_correction_bias").float(),
            top_k=config.num_experts_per_tok,
            num_groups=config.n_group,
            top_k_groups=config.topk_group,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )
        return self.ops.prepare_router(router)

    def _experts(self, prefix: str, dtype: WeightDtype) -> MlpWeights[W]:
        held = self.placement.experts(self.config.n_routed_experts)
        names = [f"{prefix}.{expert}" for expert in held]
        gate_up = [[f"{name}.gate_proj", f"{name}.up_proj"] for name in names]
        down = [[f"{name}.down_proj"] for name in names]
        # One after the other, so that only one of them is held in both forms at a time.
        return MlpWeights(
            gate_up=self.ops.prepare_weight(self._stacked(gate_up, dtype)),
            down=self.ops.prepare_weight(self._stacked(down, dtype)),
        )

    def _mlp(self, name: str, dtype: WeightDtype) -> MlpWeights[W]:
        gate_up = [f"{name}.gate_proj", f"{name}.up_proj"]
        return MlpWeights(
            gate_up=self.ops.prepare_weight(self._joined(gate_up, dtype)),
            down=self.ops.prepare_weight(self._stored(f"{name}.down_proj", dtype)),
        )

    def _norm(self, name: str) -> RmsNorm:
        return RmsNorm(weight=self._vector(f"{name}.weight"), eps=self.config.rms_norm_eps)

    def _vector(self, name: str) -> Tensor:
        return self._read(name).to(self.dtype)

    def _stored(self, name: str, dtype: WeightDtype = "stored") -> Stored:
        """The rank's share of a linear layer's weight as the checkpoint stores it, or re-quantized."""
        stored = read_matrix(self.checkpoint, name, self.spans[f"{name}.weight"])
        return recast(stored.to(self.device), dtype)

    def _joined(self, names: Sequence[str], dtype: WeightDtype) -> Stored:
        """The rows of several modules, one below the other."""
        return self._stacked([names], dtype)[0]

    def _stacked(self, grid: Sequence[Sequence[str]], dtype: WeightDtype = "stored") -> Stored:
        """A stack of matrices, each the rows of the modules in one line of `grid`."""
        parts = [[Part(name, self.spans[f"{name}.weight"]) for name in names] for names in grid]
        if dtype == "stored" and is_uniform(self.checkpoint, parts):
            return read_stack(self.checkpoint, parts).to(self.device)
        return _stack([_join_rows([self._stored(name, dtype) for name in names]) for names in grid])

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name, self.spans[name]).to(self.device)


def _join_rows(parts: Sequence[Stored]) -> Stored:
    quantized, floats = _by_kind(parts)
    return quantized_tensor.concatenate_rows(quantized) if quantized else torch.cat(floats)


def _stack(parts: Sequence[Stored]) -> Stored:
    quantized, floats = _by_kind(parts)
    return quantized_tensor.stack(quantized) if quantized else torch.stack(floats)


def _by_kind(parts: Sequence[Stored]) -> tuple[list[QuantizedTensor], list[Tensor]]:
    """`parts` if all are in one quantized format, else none; and all as floats: a mixture is dequantized."""
    quantized = [part for part in parts if isinstance(part, QuantizedTensor)]
    if len(quantized) == len(parts) and len({part.format for part in quantized}) == 1:
        return quantized, []
    return [], [p.dequantize() if isinstance(p, QuantizedTensor) else p for p in parts]
