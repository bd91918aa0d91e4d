"""The engine as the requests of one API key see it: own turns, own prefix cache, own account."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from nybble.engine.engine_client import EngineClient
from nybble.engine.messages import AnswerEvent, Request, TokenEvent
from nybble.server.access.access import Visit


class MeteredEngine:
    """An `EngineClient` for one HTTP request; a prompt that several of its choices share is charged once."""

    def __init__(self, engine: EngineClient, visit: Visit) -> None:
        self._engine = engine
        self._visit = visit
        self._prompts: set[tuple[int, ...]] = set()

    @property
    def is_alive(self) -> bool:
        return self._engine.is_alive

    async def generate(self, request: Request) -> AsyncGenerator[AnswerEvent, None]:
        name = self._visit.name
        own = msgspec.structs.replace(request, tenant=name, cache_salt=own_salt(name, request.cache_salt))
        async with aclosing(self._engine.generate(own)) as events:
            async for event in events:
                if isinstance(event, TokenEvent):
                    self._charge(request.prompt_token_ids, event)
                yield event

    def _charge(self, prompt: tuple[int, ...], event: TokenEvent) -> None:
        if prompt in self._prompts:
            self._visit.charge(num_completion=1)
        else:
            self._prompts.add(prompt)
            self._visit.charge(len(prompt), event.num_cached_tokens, 1)


def own_salt(name: str, salt: str) -> str:
    """A salt that no other key can give: names have no colon."""
    return f"{name}:{salt}"
