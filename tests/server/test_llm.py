"""Offline generation on the demo model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import glm_template
import pytest
from tiny_glm import make_checkpoint
from tiny_tokenizer import write_tokenizer

from nybble.engine.engine_config import CacheConfig, EngineConfig
from nybble.engine.errors import ContextLengthError, InvalidRequestError
from nybble.engine.tokenizer import Tokenizer
from nybble.server.llm import LLM
from nybble.server.requests.sampling_options import SamplingOptions

GREEDY = SamplingOptions(temperature=0.0, max_tokens=16)


@pytest.fixture(scope="module")
def llm(demo_checkpoint: Path) -> LLM:
    cache = CacheConfig(kv_cache_memory=0.5)
    return LLM(EngineConfig(checkpoint=str(demo_checkpoint), device="cpu", cache=cache))


def test_chat_names_paris(llm: LLM) -> None:
    (answer,) = llm.chat([[{"role": "user", "content": "What is the capital of France?"}]], GREEDY)
    assert "Paris" in answer.text


def test_an_fp8_cache_names_paris_too(demo_checkpoint: Path) -> None:
    cache = CacheConfig(kv_cache_memory=0.1, kv_cache_dtype="fp8")
    llm = LLM(EngineConfig(checkpoint=str(demo_checkpoint), device="cpu", cache=cache))
    (answer,) = llm.chat([[{"role": "user", "content": "What is the capital of France?"}]], GREEDY)
    assert "Paris" in answer.text


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["The capital of Germany is", "1, 2, 3, 4,", "Once upon a time"]
    together = llm.generate(prompts, GREEDY)
    assert [answer.text for answer in together] == [llm.generate([p], GREEDY)[0].text for p in prompts]
    assert " 5, 6" in together[1].text


def test_prompts_as_token_ids_and_prefix_cache(llm: LLM) -> None:
    prompt = tuple(range(100, 140))
    first, second = (llm.generate([prompt], GREEDY)[0] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert (first.num_prompt_tokens, first.num_cached_tokens, second.num_cached_tokens) == (40, 0, 32)


def test_stop_string_ends_one_and_leaves_the_others(llm: LLM) -> None:
    counting, story = llm.generate(["1, 2, 3, 4,", "Once upon a time"], GREEDY, stop=[" 6"])
    assert counting.text == " 5,"
    assert counting.finish_reason == "stop"
    assert (story.finish_reason, len(story.token_ids)) == ("length", 16)


def test_logprobs(llm: LLM) -> None:
    options = SamplingOptions(temperature=0.0, max_tokens=4, num_logprobs=2)
    (answer,) = llm.generate(["1, 2, 3, 4,"], options)
    assert "".join(entry.token for entry in answer.logprobs) == answer.text
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in answer.logprobs)


def test_n_answers_to_each_prompt_share_its_computation(llm: LLM) -> None:
    options = SamplingOptions(temperature=1.0, max_tokens=3, seed=3, n=3)
    prompts = ["Once upon a time there was " * 6, "1, 2, 3, 4,"]
    answers = llm.generate(prompts, options)
    assert len(answers) == 6 and len({answer.token_ids for answer in answers[:3]}) == 3
    assert answers[0].token_ids == llm.generate(prompts[0], replace(options, n=1))[0].token_ids
    first, *others = answers[:3]
    assert first.num_cached_tokens == 0
    assert {other.num_cached_tokens for other in others} == {(first.num_prompt_tokens - 1) // 16 * 16}


def test_bad_words_and_min_tokens(llm: LLM) -> None:
    (banned,) = llm.generate("1, 2, 3, 4,", replace(GREEDY, bad_words=["5"], max_tokens=4))
    assert "5" not in banned.text
    options = replace(GREEDY, min_tokens=7, max_tokens=9)
    (longer,) = llm.generate("1, 2, 3, 4,", options, stop=[" 5", " 8"])  # " 5, 6, 7, 8, 9"
    assert 7 < len(longer.token_ids) <= 9 and " 5, 6" in longer.text


def test_a_bad_prompt_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="token ids must lie in"):
        llm.generate(["good", (10**6,)], GREEDY)
    with pytest.raises(ContextLengthError):
        llm.generate(["good", (5,) * 8192], GREEDY)
    assert len(llm.generate(["good"], GREEDY)) == 1


def test_one_text_is_one_prompt_and_one_stop_string(llm: LLM) -> None:
    (answer,) = llm.generate("1, 2, 3, 4,", GREEDY, stop=" 6")
    assert answer.text == " 5,"


@pytest.fixture(scope="module")
def thinking_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with GLM-4.7's tags and template."""
    directory = tmp_path_factory.mktemp("thinker")
    make_checkpoint(directory, vocab_size=320)
    special = (*glm_template.SPECIAL_TOKENS, "<|end|>")
    write_tokenizer(directory, glm_template.TEMPLATE, special, glm_template.TEXT_TOKENS)
    return directory


@pytest.fixture(scope="module")
def thinker(thinking_checkpoint: Path) -> LLM:
    cache = CacheConfig(kv_cache_memory=0.01)
    return LLM(
        EngineConfig(checkpoint=str(thinking_checkpoint), device="cpu", max_model_len=256, cache=cache)
    )


def test_a_chats_thought_is_apart_from_its_answer(thinker: LLM, thinking_checkpoint: Path) -> None:
    tokenizer = Tokenizer(thinking_checkpoint)
    question = [{"role": "user", "content": "hi"}]
    end = tokenizer.encode("</think>")
    options = SamplingOptions(max_tokens=12, seed=1, n=4, temperature=2.0, allowed_token_ids=[*b"ab", *end])
    answers = thinker.chat([question], options)
    assert any(answer.text and answer.reasoning for answer in answers)
    for answer in answers:
        thought, _, rest = tokenizer.decode(answer.token_ids).partition("</think>")
        while rest.startswith("</think>"):  # said again
            rest = rest.removeprefix("</think>")
        assert (answer.reasoning, answer.text) == (thought, rest)
    prompt = tokenizer.encode_chat(question).token_ids
    texts = [(text.reasoning, text.text) for text in thinker.generate([prompt], options)]
    assert texts == [("", tokenizer.decode(answer.token_ids)) for answer in answers]


def test_a_length_reached_in_a_thought_leaves_no_answer(thinker: LLM) -> None:
    options = SamplingOptions(max_tokens=5, allowed_token_ids=[*b"a"])
    (answer,) = thinker.chat([[{"role": "user", "content": "hi"}]], options)
    assert (answer.reasoning, answer.text, answer.finish_reason) == ("aaaaa", "", "length")


@pytest.mark.parametrize(
    ("prompt", "options", "stop", "parameter"),
    [
        ("good", GREEDY, [""], "stop"),
        ("good", SamplingOptions(max_tokens=0), [], "max_tokens"),
        ("good", SamplingOptions(top_k=-7), [], "top_k"),
        ("good", SamplingOptions(temperature=-1.0), [], "temperature"),
        ("good", SamplingOptions(n=0), [], "n"),
        ("good", SamplingOptions(n=9), [], "n"),
        ("good", SamplingOptions(logit_bias={10**6: 1.0}), [], "logit_bias"),
        ("good", SamplingOptions(bad_words=["  "]), [], "bad_words"),
        ("good", SamplingOptions(max_tokens=3, min_tokens=4), [], "min_tokens"),
        ("\ud800", GREEDY, [], "prompt"),
    ],
)
def test_bad_arguments_are_named(
    llm: LLM, prompt: str, options: SamplingOptions, stop: list[str], parameter: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate([prompt], options, stop)
    assert caught.value.parameter == parameter
