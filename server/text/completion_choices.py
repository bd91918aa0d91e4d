"""Answers to prompts in the shape of completions, whose log-probabilities are lists side by side."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from nybble.engine.messages import TokenLogprobs
from nybble.engine.tokenizer import Tokenizer
from nybble.server.requests.completion_request import PromptToComplete
from nybble.server.requests.completion_schemas import CompletionChoice, CompletionLogprobs
from nybble.server.requests.schemas import LogprobEntry
from nybble.server.text.logprob_entries import IMPOSSIBLE
from nybble.server.text.text_stream import Delta


class ChoiceShaper:
    """From the deltas of one answer to its choices, the first of which has the echo."""

    def __init__(
        self, index: int, prompt: PromptToComplete, scores: Sequence[TokenLogprobs], tokenizer: Tokenizer
    ) -> None:
        """scores: of the prompt's tokens from the second on, there when the first delta comes."""
        self._index = index
        self._prompt = prompt
        self._scores = scores
        self._tokenizer = tokenizer
        self._is_first = True
        self._echoed: CompletionLogprobs | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    @property
    def must_prepare(self) -> bool:
        """Whether `prepare` is to be called before the first `choice`."""
        return self._is_first and self._prompt.has_scores

    def prepare(self) -> None:
        """List the log-probabilities of the prompt, which takes long for a long one. Nothing is before its
        first token, which has none."""
        names = [self._tokenizer.token_bytes(token_id) for token_id in self._prompt.token_ids]
        self._echoed = CompletionLogprobs(
            text_offset=[self._offset(name) for name in names],
            token_logprobs=[None, *(max(one.logprob, IMPOSSIBLE) for one in self._scores)],
            tokens=[name.decode("utf-8", "replace") for name in names],
            top_logprobs=[None],
        )
        for token, score in zip(self._echoed.tokens[1:], self._scores, strict=True):
            self._echoed.top_logprobs.append(self._top_of(token, score))

    def choice(self, delta: Delta) -> CompletionChoice:
        echo = self._prompt.echo if self._is_first else ""
        logprobs = None
        if self._prompt.sampling.num_logprobs is not None:
            parts = [self._echoed] if self._echoed is not None else []
            logprobs = joined_logprobs([*parts, self._logprobs(delta.logprobs)])
        self._is_first, self._echoed = False, None
        return CompletionChoice(echo + delta.text, self._index, logprobs, delta.finish_reason)

    def _top_of(self, token: str, score: TokenLogprobs) -> dict[str, float]:
        found = {
            self._tokenizer.token_bytes(token_id).decode("utf-8", "replace"): max(logprob, IMPOSSIBLE)
            for token_id, logprob in reversed(score.top)
        }
        found.setdefault(token, max(score.logprob, IMPOSSIBLE))
        return found

    def _logprobs(self, entries: Sequence[LogprobEntry]) -> CompletionLogprobs:
        return CompletionLogprobs(
            text_offset=[self._offset(bytes(entry.bytes)) for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            tokens=[entry.token for entry in entries],
            top_logprobs=[_top_logprobs(entry) for entry in entries],
        )

    def _offset(self, token_bytes: bytes) -> int:
        start = self._num_characters
        self._num_characters += len(self._decoder.decode(token_bytes))
        return start


class GrowingChoice:
    """One answer as it grows."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._pieces: list[CompletionChoice] = []

    def add(self, piece: CompletionChoice) -> None:
        self._pieces.append(piece)

    def choice(self) -> CompletionChoice:
        pieces = self._pieces
        logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        return CompletionChoice(
            text="".join(piece.text for piece in pieces),
            index=self._index,
            logprobs=joined_logprobs(logprobs) if logprobs else None,
            finish_reason=pieces[-1].finish_reason,
        )


def joined_logprobs(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    if len(parts) == 1:
        return parts[0]
    return CompletionLogprobs(
        text_offset=[item for part in parts for item in part.text_offset],
        token_logprobs=[item for part in parts for item in part.token_logprobs],
        tokens=[item for part in parts for item in part.tokens],
        top_logprobs=[item for part in parts for item in part.top_logprobs],
    )


def _top_logprobs(entry: LogprobEntry) -> dict[str, float]:
    """The likeliest tokens and the one that was taken. Of two with the same text the likelier stays."""
    # Reversed: the likelier comes first.
    found = {top.token: top.logprob for top in reversed(entry.top_logprobs)}
    found.setdefault(entry.token, entry.logprob)
    return found
