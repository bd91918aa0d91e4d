"""What a user says about sampling, and what it means for a given model and prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from nybble.engine.errors import ContextLengthError
from nybble.engine.grammar.grammar import Grammar
from nybble.engine.messages import SamplingParams
from nybble.engine.tokenizer import Tokenizer
from nybble.server.served_model import ServedModel

_MASK63 = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """None takes the checkpoint's default; for max_tokens, all the room that the prompt leaves.

    temperature 0 is greedy; top_k 0 (or vLLM's -1), top_p 1 and min_p 0 are off. The same seed gives the
    same tokens, whatever runs beside it. num_logprobs n adds each token's logprob and the n likeliest.
    n asks for so many answers to each prompt.

    Penalties are OpenAI's, repetition_penalty, min_tokens, ignore_eos and lists are vLLM's: see
    `SamplingParams`. bad_words are banned as they are tokenized at the start of a text and after a space.
    """

    n: int = 1

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    seed: int | None = None
    num_logprobs: int | None = None
    grammar: Grammar | None = None

    def resolve(self, model: ServedModel, num_prompt_tokens: int) -> SamplingParams:
        """Settle every default. Raises ContextLengthError if prompt and answer do not fit."""
        max_tokens = 1 if self.max_tokens is None else self.max_tokens
        ContextLengthError.check(num_prompt_tokens, max_tokens, model.max_model_len)
        if self.max_tokens is None:
            max_tokens = model.max_model_len - num_prompt_tokens
        defaults = model.sampling_defaults
        top_k = defaults.top_k if self.top_k is None else self.top_k
        repetition_penalty = self.repetition_penalty
        end_ids = () if self.ignore_eos else model.stop_token_ids
        allowed = self.allowed_token_ids
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_k=0 if top_k == -1 else top_k,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            min_p=self.min_p,
            min_tokens=self.min_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=(
                defaults.repetition_penalty if repetition_penalty is None else repetition_penalty
            ),
            logit_bias=tuple(self.logit_bias.items()),
            allowed_token_ids=None if allowed is None else tuple(allowed),
            bad_words=_token_sequences(self.bad_words, model.tokenizer),
            seed=None if self.seed is None else self.seed & _MASK63,
            stop_token_ids=tuple(dict.fromkeys((*end_ids, *self.stop_token_ids))),
            num_logprobs=self.num_logprobs,
            grammar=self.grammar,
        )


def choice_sampling(sampling: SamplingParams, number: int) -> SamplingParams:
    """How one of several answers is sampled: the first as if alone, the others by seeds derived from its
    seed. Without one, the engine draws one for each."""
    if sampling.seed is None or number == 0:
        return sampling
    digest = hashlib.blake2b(f"{sampling.seed} {number}".encode(), digest_size=8).digest()
    return replace(sampling, seed=int.from_bytes(digest, "little") & _MASK63)


def _token_sequences(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Of each word its tokens at the start of a text and after a space, if they differ."""
    texts = (text for word in words for text in (word.lstrip(), f" {word.lstrip()}"))
    return tuple(dict.fromkeys(map(tokenizer.encode, texts)))
