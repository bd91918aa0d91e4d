"""What transformers' models guess after a text."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_glm import draft_oracle
from torch import Tensor
from transformers import Glm4MoeForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel


class DraftOracle:
    def __init__(self, directory: Path, main: Glm4MoeForCausalLM) -> None:
        self._main = main
        self._draft: MtpModel = draft_oracle(directory, main)

    @torch.inference_mode()
    def logits(self, token_ids: list[int], depth: int) -> Tensor:
        """[depth, V]: of each guess after `token_ids`, the first of which stands for the token that follows.

        The main model has computed all but the last of them, as it has when that was sampled. Each guess
        after the first comes from the guesses before it.
        """
        hidden = self._main.model(torch.tensor([token_ids[:-1]])).last_hidden_state
        cache, logits = MtpCache(config=self._draft.config), []
        tokens, position = torch.tensor([token_ids[1:]]), 1
        for _ in range(depth):
            positions = torch.arange(position, position + tokens.shape[1]).unsqueeze(0)
            hidden = self._draft.forward_layer(0, hidden, positions, cache, input_ids=tokens)[:, -1:]
            position += tokens.shape[1]
            logits.append(self._draft.shared_head(hidden)[0, -1])
            tokens = logits[-1].argmax().view(1, 1)
        return torch.stack(logits)

    def guesses(self, token_ids: list[int], depth: int) -> tuple[int, ...]:
        """The likeliest tokens, one after the other."""
        return tuple(self.logits(token_ids, depth).argmax(dim=-1).tolist())
