"""The engine with the demo model, in this process, and how its speed is taken."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from nybble.engine.engine import Engine
from nybble.engine.engine_config import CacheConfig, EngineConfig
from nybble.engine.loading import load_engine, prepare
from nybble.engine.messages import Request, SamplingParams, TokenEvent
from nybble.engine.tokenizer import Tokenizer

_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass(frozen=True)
class Decoding:
    """length: of each prompt; prompt_seconds: until every chat had its first token; step_seconds: of the
    steps that then gave each one more."""

    num_chats: int
    length: int
    prompt_seconds: float
    step_seconds: list[float]

    @property
    def rate(self) -> float:
        """Tokens a second, of all chats together."""
        return self.num_chats * len(self.step_seconds) / sum(self.step_seconds)


class DemoEngine:
    """Without the prefix cache, so that a repeat must do all the work again."""

    def __init__(self, config: EngineConfig) -> None:
        """Ends the program if the model cannot name Paris: no speed is reported of a wrong model."""
        cache = CacheConfig(kv_cache_memory=2.0, enable_prefix_caching=False)
        preparation = prepare(replace(config, cache=cache))
        self.config = preparation.config
        self.engine: Engine = load_engine(preparation)
        tokenizer = Tokenizer(Path(config.checkpoint))
        self.chat_prompt = tuple(tokenizer.encode(tokenizer.render_chat(_QUESTION)))
        answer = b"".join(tokenizer.token_bytes(token) for token in self._answer(self.chat_prompt, 12))
        if b"Paris" not in answer:
            sys.exit(f"the model answers {answer!r}: no speed is reported of a wrong model")

    def prefill_seconds(self, length: int) -> float:
        """Of a prompt of random tokens, with the one token that follows it."""
        return self.prompt_seconds(_random_prompt(length))

    def first_token_seconds(self) -> float:
        """Of a short chat, from the request to its first token."""
        return self.prompt_seconds(self.chat_prompt)

    def prompt_seconds(self, prompt: tuple[int, ...]) -> float:
        self.engine.add(_request("a", prompt, 1))
        start = time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        return time.perf_counter() - start

    def decode(self, num_chats: int, num_steps: int, length: int = 16) -> Decoding:
        """Prompts of `length` random tokens, then num_steps steps that give each chat a token."""
        chats = [str(number) for number in range(num_chats)]
        for chat in chats:
            self.engine.add(_request(chat, _random_prompt(length), self._room(length)))
        start = time.perf_counter()
        waiting = set(chats)
        while waiting:
            waiting -= {event.request_id for event in self.engine.step()}
        prompt_seconds = time.perf_counter() - start
        step_seconds = [self._step_seconds(num_chats) for _ in range(num_steps)]
        for chat in chats:
            self.engine.abort(chat)
        while self.engine.has_work:
            self.engine.step()
        return Decoding(num_chats, length, prompt_seconds, step_seconds)

    def _room(self, length: int) -> int:
        assert self.config.max_model_len is not None
        return self.config.max_model_len - length

    def _step_seconds(self, num_chats: int) -> float:
        start = time.perf_counter()
        events = self.engine.step()
        seconds = time.perf_counter() - start
        assert len(events) == num_chats, events
        return seconds

    def _answer(self, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        self.engine.add(_request("check", prompt, max_tokens))
        tokens: list[int] = []
        while self.engine.has_work:
            for event in self.engine.step():
                assert isinstance(event, TokenEvent), event
                tokens.append(event.token_id)
        return tokens


def _request(request_id: str, prompt: tuple[int, ...], max_tokens: int) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)


def _random_prompt(length: int) -> tuple[int, ...]:
    return tuple(random.randrange(20, 49000) for _ in range(length))
