from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paged_runner import PagedRunner

from nybble.engine.engine import Engine, EngineLimits
from nybble.engine.engine_config import SchedulerConfig
from nybble.engine.messages import EngineStats, Request, TokenEvent
from nybble.engine.scheduling.block_pool import BlockPool
from nybble.engine.scheduling.scheduler import Scheduler
from nybble.engine.scheduling.step import Chunk, SampledToken
from nybble.engine.tokenizer import Tokenizer
from nybble.server.app import create_app
from nybble.server.chat.replay_store import ReplayStore
from nybble.server.served_model import ServedModel
from nybble.server.server_config import ServerConfig

LETTERS = tuple(b"hello")  # the tiny tokenizer has a token for the word


def _chat(tokenizer: Tokenizer, *turns: str) -> tuple[int, ...]:
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return tokenizer.encode(tokenizer.render_chat(messages))


def _text(tokenizer: Tokenizer, token_ids: tuple[int, ...]) -> bytes:
    return b"".join(map(tokenizer.token_bytes, token_ids))


def _store(tokenizer: Tokenizer, max_tokens: int = 1000) -> ReplayStore:
    """Knows that "hi" was answered letter by letter, under the salt "ann"."""
    store = ReplayStore(tokenizer, max_tokens)
    (end,) = tokenizer.encode("<|end|>")
    store.remember("ann", _chat(tokenizer, "hi"), [*LETTERS, end], "hello")
    return store


def test_a_turn_keeps_the_tokens_in_which_it_was_given(tokenizer: Tokenizer) -> None:
    prompt = _chat(tokenizer, "hi", "hello", "hello")
    found = _store(tokenizer).replayed("ann", prompt)
    answer = [place for place, token_id in enumerate(found) if found[place : place + 5] == LETTERS]
    assert len(answer) == 1 and len(found) == len(prompt) + 4  # the users' hello is the tokenizer's
    assert _text(tokenizer, found) == _text(tokenizer, prompt)


@pytest.mark.parametrize("turns", [("hi", "hello!", "x"), ("hi", "hell", "x"), ("hello", "hi", "x")])
def test_an_edited_turn_is_tokenized(tokenizer: Tokenizer, turns: tuple[str, ...]) -> None:
    prompt = _chat(tokenizer, *turns)
    assert _store(tokenizer).replayed("ann", prompt) == prompt


def test_another_user_turn_before_it_changes_nothing(tokenizer: Tokenizer) -> None:
    found = _store(tokenizer).replayed("ann", _chat(tokenizer, "good", "hello", "x"))
    assert bytes(LETTERS) in bytes(token_id % 256 for token_id in found)


@pytest.mark.parametrize("salt", ["", "bob", "ann "])
def test_another_salt_sees_nothing(tokenizer: Tokenizer, salt: str) -> None:
    prompt = _chat(tokenizer, "hi", "hello", "x")
    assert _store(tokenizer).replayed(salt, prompt) == prompt


@pytest.mark.parametrize(
    ("answer", "text", "spelled"),
    [
        (b"hello and", "hello a", b"hello a"),  # a stop string cut it within what the tokenizer calls "and"
        (b"hello", "hel", b"hel"),
        (b"hello\xc3\xa9", "hello\xe9", b"hello\xc3\xa9"),
    ],
)
def test_a_text_that_was_cut_keeps_the_tokens_that_it_has(
    tokenizer: Tokenizer, answer: bytes, text: str, spelled: bytes
) -> None:
    store = ReplayStore(tokenizer, 1000)
    store.remember("", _chat(tokenizer, "hi"), list(answer), text)
    prompt = _chat(tokenizer, "hi", text, "x")
    found = store.replayed("", prompt)
    assert _text(tokenizer, found) == _text(tokenizer, prompt)
    assert tuple(spelled) == found[4 : 4 + len(spelled)]


def test_half_a_character_is_no_turn(tokenizer: Tokenizer) -> None:
    """It was sent as U+FFFD, which is what comes back."""
    store = ReplayStore(tokenizer, 1000)
    store.remember("", _chat(tokenizer, "hi"), [*LETTERS, 0xC3], "hello\ufffd")
    prompt = _chat(tokenizer, "hi", "hello\ufffd", "x")
    found = store.replayed("", prompt)
    assert _text(tokenizer, found) == _text(tokenizer, prompt)
    assert found[4:9] == LETTERS


def test_the_least_recently_used_goes_first(tokenizer: Tokenizer) -> None:
    store = ReplayStore(tokenizer, max_tokens=3 * (64 + 5))
    turns = {name: _chat(tokenizer, "hi", f"hell{name}", "x") for name in "abcd"}

    def is_known(name: str) -> bool:
        return store.replayed("", turns[name])[4:9] == (*b"hell", ord(name)) != turns[name][4:9]

    def remember(name: str) -> None:
        store.remember("", _chat(tokenizer, "hi"), list(b"hell" + name.encode()), f"hell{name}")

    for name in "abc":
        remember(name)
    remember("a")  # again: it takes no more room
    assert [is_known(name) for name in "bca"] == [True] * 3
    remember("d")
    assert [is_known(name) for name in "abcd"] == [True, False, True, True]


def test_without_room_nothing_is_kept(tokenizer: Tokenizer) -> None:
    prompt = _chat(tokenizer, "hi", "hello", "x")
    assert _store(tokenizer, max_tokens=0).replayed("ann", prompt) == prompt
    assert _store(tokenizer, max_tokens=60).replayed("ann", prompt) == prompt


_TURN = st.sampled_from(["hello", "hell", "good and good", "é", "", "<think>x</think>"])
_TURNS = st.lists(_TURN, min_size=1, max_size=5)


@given(_TURNS, st.booleans())
def test_the_text_of_a_prompt_never_changes(tokenizer: Tokenizer, turns: list[str], is_cut: bool) -> None:
    """Whatever was answered letter by letter before."""
    store = ReplayStore(tokenizer, 1000)
    for length in range(1, len(turns), 2):
        answer = list(turns[length].encode())
        text = turns[length][:-1] if is_cut else turns[length]
        store.remember("", _chat(tokenizer, *turns[:length]), answer, text)
    prompt = _chat(tokenizer, *turns)
    assert _text(tokenizer, store.replayed("", prompt)) == _text(tokenizer, prompt)


# Thoughts, with GLM's template.

USER = {"role": "user", "content": "hi"}


def _letters(glm: ServedModel, thought: str, answer: str) -> list[int]:
    (end,) = glm.tokenizer.encode("</think>")
    return [*thought.encode(), end, *answer.encode()]


def _history(glm: ServedModel, thought: str, answer: str, clear_thinking: bool) -> tuple[int, ...]:
    """The prompt of the next turn, as a client sends back what it was given: without space at the edges."""
    turn = {"role": "assistant", "content": answer.strip(), "reasoning_content": thought.strip()}
    options = {"clear_thinking": clear_thinking}
    return glm.tokenizer.encode_chat([USER, turn, USER], (), options).token_ids


def _holds(token_ids: tuple[int, ...], part: str) -> bool:
    """Letter by letter, and not in the tokenizer's words."""
    letters = tuple(part.encode())
    return any(token_ids[n : n + len(letters)] == letters for n in range(len(token_ids)))


@pytest.mark.parametrize("clear_thinking", [True, False])
@pytest.mark.parametrize(
    ("thought", "answer"), [("hello and", "good world"), ("\nhello and.\n", "\n\ngood world \n")]
)
def test_thought_and_answer_keep_their_tokens(
    glm: ServedModel, thought: str, answer: str, clear_thinking: bool
) -> None:
    """Also where the template strips what the model wrote around them, or drops the thought."""
    store, given = ReplayStore(glm.tokenizer, 1000), _letters(glm, thought, answer)
    prompt = glm.tokenizer.encode_chat([USER]).token_ids
    store.remember("", prompt, given, glm.tokenizer.decode(given))
    history = _history(glm, thought, answer, clear_thinking)
    found = store.replayed("", history)
    assert _text(glm.tokenizer, found) == _text(glm.tokenizer, history)
    assert _holds(found, "good world") and not _holds(history, "good world")
    assert _holds(found, "hello and") is (not clear_thinking)


_SPACED = st.builds(
    lambda before, text, after: before + text + after,
    st.sampled_from(["", " ", "\n", "\n\n", "\u2003"]),
    st.sampled_from(["hello", "good and", "é", "a\n b", ""]),
    st.sampled_from(["", " ", ".\n", "\n"]),
)


@given(_SPACED, _SPACED, st.booleans(), st.booleans())
def test_the_text_of_a_history_never_changes(
    glm: ServedModel, thought: str, answer: str, is_spelled: bool, clear_thinking: bool
) -> None:
    store = ReplayStore(glm.tokenizer, 1000)
    given = _letters(glm, thought, answer)
    if is_spelled:
        given = list(glm.tokenizer.encode(glm.tokenizer.decode(given)))
    store.remember("", glm.tokenizer.encode_chat([USER]).token_ids, given, glm.tokenizer.decode(given))
    history = _history(glm, thought, answer, clear_thinking)
    assert _text(glm.tokenizer, store.replayed("", history)) == _text(glm.tokenizer, history)


# From HTTP to the prefix cache, with the demo's tokenizer and template.


class _DictatedRunner(PagedRunner):
    """Answers every prompt with the same tokens."""

    def __init__(self, answer: list[int]) -> None:
        super().__init__(block_size=16)
        self._answer = answer
        self.num_prompt_tokens = 0

    def _sample(self, chunk: Chunk) -> Iterator[SampledToken]:
        end = chunk.start + len(chunk.token_ids)
        yield SampledToken(self._answer[end - self.num_prompt_tokens], None)


class _LocalEngine:
    """An engine in this process, for one request at a time."""

    is_alive = True
    stats: EngineStats | None = None

    def __init__(self, answer: list[int]) -> None:
        self._runner = _DictatedRunner(answer)
        scheduler = Scheduler(SchedulerConfig(), BlockPool(1000), 16, enable_prefix_caching=True)
        self._engine = Engine(self._runner, scheduler, EngineLimits(4096, 50_000, 16))
        self.prompts: list[tuple[int, ...]] = []

    async def generate(self, request: Request) -> AsyncGenerator[Sequence[TokenEvent], None]:
        self._runner.num_prompt_tokens = len(request.prompt_token_ids)
        self.prompts.append(request.prompt_token_ids)
        self._engine.add(request)
        while self._engine.has_work:
            events = self._engine.step()
            yield [event for event in events if isinstance(event, TokenEvent)]


def _misspelled_words(tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """Pairs of tokens whose text the tokenizer gives as one."""
    for token_id in range(1000, 49_000):
        text = tokenizer.token_bytes(token_id)
        if text[:1] == b" " and text[1:].isalpha() and len(text) > 6:
            halves = tokenizer.encode(text[:4].decode()), tokenizer.encode(text[4:].decode())
            if all(len(half) == 1 for half in halves):
                yield halves[0][0], halves[1][0]


@pytest.fixture(scope="module")
def demo_model(demo_checkpoint: Path, model: ServedModel) -> ServedModel:
    return replace(model, name="demo", tokenizer=Tokenizer(demo_checkpoint), max_model_len=4096)


@pytest.fixture(scope="module")
def misspelled(demo_model: ServedModel) -> list[int]:
    """An answer of 100 tokens that its text is not tokenized to, and the end of turn."""
    pairs = itertools.islice(_misspelled_words(demo_model.tokenizer), 50)
    (end,) = demo_model.tokenizer.encode("<|im_end|>")
    return [*itertools.chain.from_iterable(pairs), end]


async def _post(client: httpx.AsyncClient, messages: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
    body = {"model": "demo", "messages": messages, "max_tokens": 101, "explain_cache": True} | fields
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def _second_turn(
    model: ServedModel, answer: list[int], edit: str = "", first_salt: str = "ann", **server: Any
) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """Details of what was cached of the second turn of a chat, and both prompts."""
    model = replace(model, stop_token_ids=(answer[-1],))

    async def scenario() -> tuple[dict[str, Any], list[tuple[int, ...]]]:
        engine = _LocalEngine(answer)
        transport = httpx.ASGITransport(create_app(engine, model, ServerConfig(**server)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            messages = [{"role": "user", "content": "Say a few words."}]
            first = await _post(client, messages, cache_salt=first_salt)
            message = first["choices"][0]["message"]
            messages += [{"role": "assistant", "content": message["content"] + edit}]
            messages += [{"role": "user", "content": "Go on."}]
            second = await _post(client, messages, cache_salt="ann")
        rendered = model.tokenizer.render_chat(messages)
        assert _text(model.tokenizer, engine.prompts[1]) == rendered.encode()
        details: dict[str, Any] = second["usage"]["prompt_tokens_details"]
        return details, engine.prompts

    return asyncio.run(scenario())


def test_a_turn_that_comes_back_is_found_in_the_prefix_cache(
    demo_model: ServedModel, misspelled: list[int]
) -> None:
    details, (first, second) = _second_turn(demo_model, misspelled)
    assert second[: len(first) + len(misspelled)] == (*first, *misspelled)
    # The end of turn was sampled, and never computed.
    assert details["cached_tokens"] == (len(first) + len(misspelled) - 1) // 16 * 16


def test_without_replay_the_cache_ends_where_the_answer_begins(
    demo_model: ServedModel, misspelled: list[int]
) -> None:
    details, (first, second) = _second_turn(demo_model, misspelled, max_replay_tokens=0)
    assert second == demo_model.tokenizer.encode(_text(demo_model.tokenizer, second).decode())
    assert details["cached_tokens"] == len(first) // 16 * 16
    assert details["cache_miss"] == {
        "reason": "different_token",
        "first_differing_token": len(first),
        "text": demo_model.tokenizer.token_bytes(second[len(first)]).decode(),
    }


@pytest.mark.parametrize("changes", [{"edit": "!"}, {"first_salt": "bob"}], ids=str)
def test_an_edited_or_a_strangers_turn_is_tokenized(
    demo_model: ServedModel, misspelled: list[int], changes: dict[str, str]
) -> None:
    _, (_, second) = _second_turn(demo_model, misspelled, **changes)
    assert second == demo_model.tokenizer.encode(_text(demo_model.tokenizer, second).decode())
