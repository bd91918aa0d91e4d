"""Log-probabilities of the engine as entries of the API: token ids become texts and bytes."""

from __future__ import annotations

from nybble.engine.messages import TokenLogprobs
from nybble.engine.tokenizer import Tokenizer
from nybble.server.requests.schemas import LogprobEntry, TopLogprob

IMPOSSIBLE = -9999.0  # JSON has no -inf; a token that cannot be drawn gets OpenAI's stand-in


def logprob_entry(tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs) -> LogprobEntry:
    chosen = _top_logprob(tokenizer, token_id, logprobs.logprob)
    return LogprobEntry(
        token=chosen.token,
        logprob=chosen.logprob,
        bytes=chosen.bytes,
        top_logprobs=[_top_logprob(tokenizer, *pair) for pair in logprobs.top],
    )


def _top_logprob(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    token_bytes = tokenizer.token_bytes(token_id)
    return TopLogprob(
        token=token_bytes.decode("utf-8", "replace"),
        logprob=max(logprob, IMPOSSIBLE),
        bytes=list(token_bytes),
    )
