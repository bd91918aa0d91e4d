"""Token by token to text."""

from __future__ import annotations

import codecs

from nybble.engine.tokenizer import Tokenizer


class Detokenizer:
    """Holds bytes back until they make whole characters; what never does becomes U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._holds_bytes = False

    def feed(self, token_id: int) -> tuple[str, str]:
        """What this token shows to have been an unfinished character of earlier tokens, and the text that
        it completes itself. Special tokens are not text."""
        if self._tokenizer.is_special(token_id):
            return "", ""
        token_bytes = self._tokenizer.token_bytes(token_id)
        if not self._holds_bytes and token_bytes.isascii():  # nearly always, and much faster
            return "", token_bytes.decode("ascii")
        is_continued = not token_bytes or 0x80 <= token_bytes[0] < 0xC0
        unfinished = "" if is_continued else self.finish()
        text = self._decoder.decode(token_bytes)
        self._holds_bytes = self._decoder.getstate()[0] != b""
        return unfinished, text

    def finish(self) -> str:
        """What is left of an unfinished character."""
        self._holds_bytes = False
        return self._decoder.decode(b"", final=True)
