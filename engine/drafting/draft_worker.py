"""A rank's part of drafting: the rows of the draft layer for a step, then one draft after the other."""

from __future__ import annotations

from typing import Generic

import torch
from torch import Tensor

from nybble.engine.drafting.draft_model import DraftModel
from nybble.engine.drafting.draft_step import DraftInput
from nybble.engine.ranks.rank_group import RankGroup
from nybble.engine.scheduling.step import StepInput
from nybble.kernels.ops import AttentionBatch, KVCacheLayer, W


class DraftWorker(Generic[W]):
    """num_token_ids: ids from here on are padding of the vocabulary and never drafted."""

    def __init__(
        self,
        model: DraftModel[W],
        cache: KVCacheLayer,
        group: RankGroup,
        block_size: int,
        num_token_ids: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._group = group
        self._block_size = block_size
        self._num_token_ids = num_token_ids

    def draft(self, inputs: DraftInput, step: StepInput, hidden: Tensor) -> Tensor:
        """Run the rows of `step`, whose hidden states after the final norm are `hidden` [T, H].

        Returns int64 [S', most drafts of a sequence]; what lies beyond a sequence's own number is 0.
        """
        device = hidden.device
        next_ids, rows = inputs.next_token_ids.to(device), inputs.rows.to(device)
        output, normed = self._model.forward(next_ids, hidden, step.positions, self._cache, step.attention)
        drafts = torch.zeros(len(rows), max(inputs.num_drafts, default=0), dtype=torch.int64, device=device)
        output, normed, positions = output[rows], normed[rows], step.positions[rows]
        tables = step.attention.block_tables[inputs.chunks.to(device)]
        for depth in range(drafts.shape[1]):
            count = sum(n > depth for n in inputs.num_drafts)
            if depth:
                positions = positions[:count] + 1
                batch = self._batch(positions, tables[:count])
                output, normed = self._model.forward(
                    drafts[:count, depth - 1].contiguous(), normed[:count], positions, self._cache, batch
                )
            drafts[:count, depth] = self._likeliest(self._model.logits(output))
        return drafts

    def _batch(self, positions: Tensor, tables: Tensor) -> AttentionBatch:
        """One row a sequence, at positions int64 [S']."""
        count, size = len(positions), self._block_size
        blocks = tables.gather(1, (positions // size).unsqueeze(1)).squeeze(1)
        return AttentionBatch(
            query_starts=torch.arange(count + 1, dtype=torch.int32, device=positions.device),
            context_lengths=(positions + 1).int(),
            block_tables=tables,
            slots=blocks * size + positions % size,
            query_lengths=(1,) * count,
        )

    def _likeliest(self, logits: Tensor) -> Tensor:
        """int64 [S']: the token with the largest logit, of which each rank has its share [S', V]."""
        first_id = self._group.placement.tensor_rank * logits.shape[1]
        num_own = min(max(self._num_token_ids - first_id, 0), logits.shape[1])
        logits[:, num_own:] = -torch.inf
        best, ids = logits.max(dim=-1)
        # float64 holds both exactly. Of equal logits the first rank's wins, so the lowest id.
        own = torch.stack((best.double(), (ids + first_id).double()))
        shares = torch.stack(self._group.gather_stage(own))
        winners = shares[:, 0].argmax(dim=0, keepdim=True)  # [ranks, 2, S'] -> [1, S']
        return shares[:, 1].gather(0, winners).squeeze(0).long()
