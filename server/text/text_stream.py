"""From an engine's tokens to the pieces of an answer; streamed or not, the same pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from msgspec import Struct

from nybble.engine.messages import FinishReason, TokenEvent, TokenLogprobs
from nybble.engine.tokenizer import Tokenizer
from nybble.server.requests.schemas import LogprobEntry, TopLogprob
from nybble.server.text.detokenizer import Detokenizer
from nybble.server.text.stop_strings import StopStringMatcher


class Delta(Struct, frozen=True):  # one is made for each token: a dataclass takes several times as long
    """The next piece of an answer. Its last piece carries the finish reason. num_tokens: that were read."""

    text: str
    logprobs: tuple[LogprobEntry, ...]
    finish_reason: FinishReason | None
    num_tokens: int = 1


class TextStream:
    """Detokenizes, cuts at stop strings, and lets each log-probability go with its text.

    A stop string counts from the first token after min_tokens on.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str], min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
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
        if event.logprobs is not None and not self._tokenizer.is_special(event.token_id):
            entry = self._logprob_entry(event.token_id, event.logprobs)
            self._pending.append((self._num_decoded, entry))
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

    def _logprob_entry(self, token_id: int, logprobs: TokenLogprobs) -> LogprobEntry:
        chosen = self._top_logprob(token_id, logprobs.logprob)
        return LogprobEntry(
            token=chosen.token,
            logprob=chosen.logprob,
            bytes=chosen.bytes,
            top_logprobs=[self._top_logprob(*pair) for pair in logprobs.top],
        )

    def _top_logprob(self, token_id: int, logprob: float) -> TopLogprob:
        token_bytes = self._tokenizer.token_bytes(token_id)
        # JSON has no -inf; a token that cannot be drawn gets OpenAI's stand-in.
        return TopLogprob(
            token=token_bytes.decode("utf-8", "replace"),
            logprob=max(logprob, -9999.0),
            bytes=list(token_bytes),
        )
