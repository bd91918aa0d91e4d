"""The engine as the requests of one API key see it: own turns, own prefix cache, own account."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from nybble.engine.engine_client import EngineClient
from nybble.engine.messages import AnswerEvent, Request, TokenEvent
from nybble.server.access.visit import Visit


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt of an HTTP request. max_tokens: of each of its answers."""

    token_ids: tuple[int, ...]
    num_choices: int
    max_tokens: int


class MeteredEngine:
    """An `EngineClient` for one HTTP request. Each of its prompts is charged once, whatever answers it has.

    Before any is run, the tokens of all are reserved. An answer that may fill the context, as one without
    `max_tokens` does, would reserve nearly all that there is: it gets its tokens one by one instead, and ends
    as one that has reached its length when the key's limits leave no more.
    """

    def __init__(
        self, engine: EngineClient, visit: Visit, prompts: Iterable[AskedPrompt], max_model_len: int
    ) -> None:
        """Raises TooManyRequestsError: the request may use more than the key's limits leave."""
        self._engine = engine
        self._visit = visit
        self._max_model_len = max_model_len
        asked = list(prompts)
        self._uncharged = Counter(prompt.token_ids for prompt in asked)
        num_completion = sum(prompt.num_choices * self._num_reserved(prompt) for prompt in asked)
        visit.reserve(sum(len(prompt.token_ids) for prompt in asked), num_completion)

    @property
    def is_alive(self) -> bool:
        return self._engine.is_alive

    async def generate(self, request: Request) -> AsyncGenerator[Sequence[AnswerEvent], None]:
        name, prompt = self._visit.name, request.prompt_token_ids
        own = msgspec.structs.replace(request, tenant=name, cache_salt=own_salt(name, request.cache_salt))
        has_limit = not self._may_fill_context(len(prompt), request.sampling.max_tokens)
        is_first = True
        async with aclosing(self._engine.generate(own)) as groups:
            async for events in groups:
                charged = list[AnswerEvent]()
                for event in events:
                    if isinstance(event, TokenEvent):
                        if is_first:
                            self._charge_prompt(prompt, event.num_cached_tokens)
                            is_first = False
                        if request.sampling.max_tokens:
                            event = self._charge_token(event, has_limit)
                    charged.append(event)
                    if isinstance(event, TokenEvent) and event.finish_reason is not None:
                        yield charged
                        return
                yield charged

    def _charge_token(self, event: TokenEvent, has_limit: bool) -> TokenEvent:
        """Returns it as the last one where the next would be beyond a limit."""
        self._visit.charge_token()
        if has_limit or event.finish_reason is not None or self._visit.reserve_token():
            return event
        return msgspec.structs.replace(event, finish_reason="length")

    def _charge_prompt(self, prompt: tuple[int, ...], num_cached: int) -> None:
        if self._uncharged[prompt]:
            self._uncharged[prompt] -= 1
            self._visit.charge_prompt(len(prompt), num_cached)

    def _num_reserved(self, prompt: AskedPrompt) -> int:
        if self._may_fill_context(len(prompt.token_ids), prompt.max_tokens):
            return min(1, prompt.max_tokens)
        return prompt.max_tokens

    def _may_fill_context(self, num_prompt: int, max_tokens: int) -> bool:
        return num_prompt + max_tokens >= self._max_model_len


def own_salt(name: str, salt: str) -> str:
    """A salt that no other key can give: names have no colon."""
    return f"{name}:{salt}"
