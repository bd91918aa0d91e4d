"""From an engine's tokens to the pieces of an answer; streamed or not, the same pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from nybble.engine.messages import FinishReason, TokenEvent, TokenLogprobs
from nybble.engine.tokenizer import Tokenizer
from nybble.server.requests.schemas import LogprobEntry
from nybble.server.text.detokenizer import Detokenizer
from nybble.server.text.logprob_entries import logprob_entry
from nybble.server.text.stop_strings import StopStringMatcher


class Delta(Struct, frozen=True):  # one is made for each token: a dataclass takes several times as long
    """The next piece of an answer. Its last piece carries the finish reason. num_tokens: that were read."""

    text: str
    logprobs: tuple[LogprobEntry, ...]
    finish_reason: FinishReason | None
    num_tokens: int = 1


class TextStream:
    """Detokenizes, cuts at stop strings, and lets each log-probability go with its text.

    A stop string counts from the first token after min_tokens on. lists_special: whether special tokens,
    which are not in the text, have log-probabilities too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str],
        min_tokens: int = 0,
        lists_special: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._lists_special = lists_special
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStringMatcher(stop_strings)
        self._num_unstoppable = min_tokens  # tokens to come
        self._num_decoded = 0  # characters
        self._num_released = 0
        self._pending: deque[tuple[int, LogprobEntry]] = deque()  # with the text's first character

    def feed_all(self, events: Sequence[TokenEvent]) -> Delta:
        """What several tokens add together. Those after the end of the answer are not read."""
        deltas = []
        for event in events:
            deltas.append(self.feed(event))
            if deltas[-1].finish_reason is not None:
                break
        return Delta(
            text="".join(delta.text for delta in deltas),
            logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
            finish_reason=deltas[-1].finish_reason,
            num_tokens=len(deltas),
        )

    def feed(self, event: TokenEvent) -> Delta:
        unfinished, own = self._detokenizer.feed(event.token_id)
        text = self._release(unfinished)
        if event.logprobs is not None:
            self._add_logprobs(event.token_id, event.logprobs)
        text += self._release(own)
        self._num_unstoppable -= 1
        if event.finish_reason is not None and not self._stops.has_matched:
            text += self._release(self._detokenizer.finish())
        if self._stops.has_matched:
            return Delta(text, self._released_logprobs(), "stop")
        if event.finish_reason is None:
            return Delta(text, self._released_logprobs(), None)
        text += self._stops.finish()
        return Delta(text, tuple(entry for _, entry in self._pending), event.finish_reason)

    def _add_logprobs(self, token_id: int, logprobs: TokenLogprobs) -> None:
        is_special = self._tokenizer.is_special(token_id)
        if is_special and not self._lists_special:
            return
        entry = logprob_entry(self._tokenizer, token_id, logprobs)
        if is_special:  # it has no part in the text
            entry = msgspec.structs.replace(entry, bytes=[])
        self._pending.append((self._num_decoded, entry))

    def _release(self, text: str) -> str:
        if not text:
            return ""
        self._num_decoded += len(text)
        released = text if self._num_unstoppable > 0 else self._stops.feed(text)
        self._num_released += len(released)
        return released

    def _released_logprobs(self) -> tuple[LogprobEntry, ...]:
        if not self._pending:
            return ()
        entries = []
        while self._pending and self._pending[0][0] < self._num_released:
            entries.append(self._pending.popleft()[1])
        return tuple(entries)
