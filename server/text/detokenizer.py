"""Token by token to text."""

from __future__ import annotations

import codecs

from nybble.engine.tokenizer import Tokenizer


class Detokenizer:
    """Holds bytes back until they make whole characters; what never does becomes U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> tuple[str, str]:
        """What this token shows to have been an unfinished character of earlier tokens, and the text that
        it completes itself. Special tokens are not text."""
        if self._tokenizer.is_special(token_id):
            return "", ""
        token_bytes = self._tokenizer.token_bytes(token_id)
        is_continued = not token_bytes or 0x80 <= token_bytes[0] < 0xC0
        return "" if is_continued else self.finish(), self._decoder.decode(token_bytes)

    def finish(self) -> str:
        """What is left of an unfinished character."""
        return self._decoder.decode(b"", final=True)
