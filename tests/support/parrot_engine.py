"""An engine that writes what the last message of the prompt says, tags included: a client scripts it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Sequence

from scripted_engine import scripted_logprobs

from nybble.engine.messages import EngineStats, Request, TokenEvent
from nybble.engine.tokenizer import Tokenizer

_LAST = re.compile(r".*(?:<\|user\|>|<tool_response>)(.*?)(?:</tool_response>)?<\|assistant\|>", re.DOTALL)


class ParrotEngine:
    """After the generation prompt of `glm_template`, or a prompt without roles, which it repeats."""

    def __init__(self, tokenizer: Tokenizer, end: str = "<|end|>") -> None:
        self._tokenizer = tokenizer
        (self._end_id,) = tokenizer.encode(end)
        self.is_alive = True
        self.stats: EngineStats | None = None
        self.last_token_time: float | None = None

    async def generate(self, request: Request) -> AsyncGenerator[Sequence[TokenEvent], None]:
        token_ids = [*self._words(request), self._end_id]
        num_tokens = min(len(token_ids), request.sampling.max_tokens)
        for number, token_id in enumerate(token_ids[:num_tokens], 1):
            await asyncio.sleep(0)
            self.last_token_time = time.monotonic()
            num_top = request.sampling.num_logprobs
            end = "stop" if number == len(token_ids) else "length"
            event = TokenEvent(
                request_id=request.request_id,
                token_id=token_id,
                logprobs=None if num_top is None else scripted_logprobs(token_id, num_top),
                finish_reason=end if number == num_tokens else None,
                num_cached_tokens=0,
            )
            yield [event]

    def _words(self, request: Request) -> tuple[int, ...]:
        prompt = self._tokenizer.decode(request.prompt_token_ids)
        found = _LAST.match(prompt)
        return self._tokenizer.encode(found[1] if found else prompt)
