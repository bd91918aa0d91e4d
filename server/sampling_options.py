"""What a user says about sampling, and what it means for a given model and prompt."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.engine.errors import ContextLengthError
from nybble.engine.messages import SamplingParams
from nybble.server.served_model import ServedModel

_MASK63 = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """None takes the checkpoint's default; for max_tokens, all the room that the prompt leaves.

    temperature 0 is greedy; top_k 0 (or vLLM's -1), top_p 1 and min_p 0 are off. The same seed gives the
    same tokens, whatever runs beside it. num_logprobs n adds each token's logprob and the n likeliest.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    seed: int | None = None
    num_logprobs: int | None = None

    def resolve(self, model: ServedModel, num_prompt_tokens: int) -> SamplingParams:
        """Settle every default. Raises ContextLengthError if prompt and answer do not fit."""
        max_tokens = 1 if self.max_tokens is None else self.max_tokens
        ContextLengthError.check(num_prompt_tokens, max_tokens, model.max_model_len)
        if self.max_tokens is None:
            max_tokens = model.max_model_len - num_prompt_tokens
        defaults = model.sampling_defaults
        top_k = defaults.top_k if self.top_k is None else self.top_k
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_k=0 if top_k == -1 else top_k,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            min_p=self.min_p,
            seed=None if self.seed is None else self.seed & _MASK63,
            stop_token_ids=model.stop_token_ids,
            num_logprobs=self.num_logprobs,
        )
