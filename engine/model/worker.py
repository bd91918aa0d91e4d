"""A rank's part of every step."""

from __future__ import annotations

from typing import Generic

import torch
from torch import Tensor

from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.drafting import draft_step
from nybble.engine.drafting.draft_step import DraftInput
from nybble.engine.drafting.draft_worker import DraftWorker
from nybble.engine.model.decode_graphs import DecodeGraphs, Outputs, Recorder
from nybble.engine.model.model import Glm4Moe
from nybble.engine.ranks.rank_group import Announced, RankGroup
from nybble.engine.scheduling.step import StepInput, unpack
from nybble.kernels.ops import KVCacheLayer, Ops, W


class Worker(Generic[W]):
    def __init__(
        self,
        config: ModelConfig,
        model: Glm4Moe[W],
        kv_cache: tuple[KVCacheLayer, ...],
        group: RankGroup,
        device: torch.device,
        dtype: torch.dtype,
        draft_worker: DraftWorker[W] | None = None,
    ) -> None:
        """`dtype` is that of the activations."""
        self._config = config
        self._model = model
        self._kv_cache = kv_cache
        self._group = group
        self._device = device
        self._dtype = dtype
        self._draft_worker = draft_worker
        self._decode_graphs: DecodeGraphs | None = None
        self._last_step: tuple[StepInput, Tensor] | None = None  # with its hidden states, for drafting

    @property
    def ops(self) -> Ops[W]:
        """The backend, which samples too."""
        return self._model.ops

    @torch.inference_mode()
    def record_decode_graphs(self, recorder: Recorder, max_blocks: int, max_num_drafts: int = 0) -> None:
        """From now on replay decode steps, with up to max_num_drafts drafts for each sequence.

        For a rank that has all layers. A backend that is recorded at start leaves out tokens in negative
        slots and sequences without context.
        """

        def forward(step: StepInput) -> Outputs:
            hidden = self._run_stage(step)
            return self._model.logits(hidden), self._normed(hidden)

        query_lengths = range(1, max_num_drafts + 2)
        self._decode_graphs = DecodeGraphs(forward, recorder, query_lengths, max_blocks, self._device)

    @torch.inference_mode()
    def execute(self, step: StepInput) -> Tensor | None:
        """Run this rank's layers; on rank 0 the logits float32 [S', V] of the step's `logit_rows`, if any."""
        placement = self._group.placement
        step = step.to(self._device)
        logits: Tensor | None = None
        if self._decode_graphs is not None and self._decode_graphs.can_run(step):
            logits, normed = self._decode_graphs.run(step)
            self._last_step = step, normed
        else:
            hidden = self._run_stage(step)
            if not placement.is_last_stage:
                self._group.send_hidden(hidden)
            else:
                logits = self._logits(hidden, step) if len(step.logit_rows) else None
                self._last_step = step, self._normed(hidden)
        if not len(step.logit_rows):
            return None
        if placement.rank == 0:
            return self._collect_logits(logits, len(step.logit_rows))
        if logits is not None:
            self._group.send_logits(logits)
        return None

    @torch.inference_mode()
    def draft(self, inputs: DraftInput) -> Tensor:
        """After `execute`: the drafts int64 [S', most of a sequence] that follow the step's tokens."""
        if self._draft_worker is None or self._last_step is None:
            raise ValueError("this rank has no draft layer, or no step to draft after")
        return self._draft_worker.draft(inputs, *self._last_step)

    def is_sound(self) -> bool:
        """Whether steps can still be executed, after one has failed: running out of memory does no harm, an
        illegal access ends every later call to the device."""
        if self._device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True

    def follow(self) -> None:
        """On the ranks other than 0: run what rank 0 announces, until it announces the end."""
        while (announcement := self._group.next_announcement()) is not None:
            work, numbers = announcement
            if work is Announced.STEP:
                self.execute(unpack(numbers))
            else:
                self.draft(draft_step.unpack(numbers))

    def _logits(self, hidden: Tensor, step: StepInput) -> Tensor:
        """This rank's share of the logits [S', V], on the last stage."""
        return self._model.logits(hidden[step.logit_rows])

    def _normed(self, hidden: Tensor) -> Tensor:
        """What the draft layer takes of hidden states [T, H]; without one, nothing is computed."""
        return hidden if self._draft_worker is None else self._model.normed(hidden)

    def _run_stage(self, step: StepInput) -> Tensor:
        """Hidden states [T, H] after the layers of this stage."""
        if self._group.placement.is_first_stage:
            hidden = self._model.embed(step.token_ids)
        else:
            shape = len(step.token_ids), self._config.hidden_size
            hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
            self._group.receive_hidden(hidden)
        return self._model.forward(hidden, step.positions, self._kv_cache, step.attention)

    def _collect_logits(self, own: Tensor | None, num_rows: int) -> Tensor:
        """All logits [S', V], of which each rank of the last stage has its share."""
        num_shares = self._group.placement.split.tensor_parallel
        shape = num_rows, self._config.vocab_size // num_shares
        if own is not None and num_shares == 1:
            return own
        parts = [own] if own is not None else []
        others = [
            torch.empty(shape, dtype=torch.float32, device=self._device)
            for _ in range(num_shares - len(parts))
        ]
        self._group.receive_logits(others)
        return torch.cat([*parts, *others], dim=-1)
