from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import write_tokenizer

from nybble.engine.grammar.grammar import Thought
from nybble.engine.tokenizer import Tokenizer
from nybble.server.chat.chat_request import ChatRequest, parse_chat_request, prepare_chat_request
from nybble.server.errors import BadRequestError, NotFoundError, UnprocessableError
from nybble.server.served_model import ServedModel

USER = {"role": "user", "content": "hi"}

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def _body(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": [USER]} | fields).encode()


def _prepare(model: ServedModel, /, **fields: Any) -> ChatRequest:
    return prepare_chat_request(parse_chat_request(_body(**fields)), model)


def _prompt(model: ServedModel, *messages: dict[str, Any]) -> str:
    token_ids = _prepare(model, messages=list(messages)).prompt_token_ids
    return b"".join(map(model.tokenizer.token_bytes, token_ids)).decode()


_BAD_PARTS = [{"type": "text", "text": "x"}, {"type": "text", "text": 1}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 1}, "model"),
        ({"model": None}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "function", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": None, "content": "hi"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user", "content": 1}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"text": "hi"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": _BAD_PARTS}]}, "messages[0].content[1].text"),
        ({"messages": [{"role": "assistant", "tool_calls": 1}]}, "messages[0].tool_calls"),
        ({"chat_template_kwargs": {"enable_thinkin": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking"),
        ({"reasoning_effort": "hard"}, "reasoning_effort"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort"),
        ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"messages": [{"role": "assistant", "reasoning": 1}]}, "messages[0].reasoning"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.01}, "temperature"),
        ({"temperature": 2.01}, "temperature"),
        ({"top_p": "1"}, "top_p"),
        ({"top_p": -0.01}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": []}, "min_p"),
        ({"min_p": -0.01}, "min_p"),
        ({"min_p": 1.01}, "min_p"),
        ({"max_tokens": "1"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": "1"}, "max_completion_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": 1}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"stop": ["x" * 1001]}, "stop[0]"),
        ({"stop": [str(n) for n in range(17)]}, "stop"),
        ({"seed": "1"}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream": True, "stream_options": 1}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": "1"}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"top_logprobs": 0}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        *(({"n": value}, "n") for value in ("1", 0, -1, 9, 10**30, 1.5, True)),
        ({"frequency_penalty": "0"}, "frequency_penalty"),
        ({"presence_penalty": []}, "presence_penalty"),
        *(
            ({f"{kind}_penalty": value}, f"{kind}_penalty")
            for kind in ("frequency", "presence")
            for value in (-2.01, 2.01)
        ),
        *(({"repetition_penalty": value}, "repetition_penalty") for value in (0, -1, 5.1, "1")),
        *(
            ({"logit_bias": value}, "logit_bias")
            for value in ([], {"x": 1}, {"-1": 1}, {"1.5": 1}, {str(2**31): 1}, {"5": 100.5}, {"5": None})
        ),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
        *(({"allowed_token_ids": value}, "allowed_token_ids") for value in ([], 5)),
        ({"allowed_token_ids": [5, -1]}, "allowed_token_ids[1]"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [5] * 513}, "stop_token_ids"),
        ({"bad_words": "x"}, "bad_words"),
        ({"bad_words": ["x", ""]}, "bad_words[1]"),
        ({"bad_words": ["x"] * 257}, "bad_words"),
        ({"ignore_eos": 1}, "ignore_eos"),
        *(({"min_tokens": value}, "min_tokens") for value in (-1, 1.5, 2**31)),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_chat_request(_body(**fields))
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")
    assert "$" not in caught.value.message


@pytest.mark.parametrize("name", ["model", "messages"])
def test_a_missing_field_is_named(name: str) -> None:
    fields = json.loads(_body())
    del fields[name]
    with pytest.raises(BadRequestError, match="field is missing") as caught:
        parse_chat_request(json.dumps(fields).encode())
    assert caught.value.param == name


_FUNCTION = {"name": "f", "parameters": {}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"functions": [_FUNCTION]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"verbosity": "low"}, "verbosity"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"web_search_options": {}}, "web_search_options"),
        (
            {"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}}]},
            "messages[1].function_call",
        ),
    ],
)
def test_an_unsupported_feature_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError, match="not supported") as caught:
        parse_chat_request(_body(**fields))
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")
    assert caught.value.message.startswith(f"{param}: ")


_TOOLS = [{"type": "function", "function": _FUNCTION}]
_NAMED = {"type": "function", "function": {"name": "f"}}
_JSON = {"type": "json_object"}


@pytest.mark.parametrize(
    ("fields", "parameter", "content"),
    [
        ({"tools": _TOOLS}, None, None),
        ({"tools": _TOOLS, "tool_choice": "required"}, "tool_choice", None),
        ({"tools": _TOOLS, "tool_choice": _NAMED, "response_format": _JSON}, "tool_choice", None),
        ({"tools": _TOOLS, "response_format": _JSON}, "tools", "response_format"),
        ({"tools": _TOOLS, "response_format": _JSON, "tool_choice": "none"}, "response_format", None),
        ({"tools": [_TOOLS[0] | {"function": _FUNCTION | {"strict": True}}]}, "tools", None),
    ],
)
def test_the_form_of_an_answer_with_tools(
    glm: ServedModel, fields: dict[str, Any], parameter: str | None, content: str | None
) -> None:
    """After the thought, which the prompt opens."""
    grammar = _prepare(glm, **fields).sampling.grammar
    assert (grammar and grammar.parameter) == parameter
    if grammar is not None:
        assert (grammar.content and grammar.content.parameter) == content
        assert grammar.thought == Thought(end_token_id=glm.tokenizer.encode("</think>")[0])
        with pytest.raises(BadRequestError, match=r"^ignore_eos: not together with"):
            _prepare(glm, **fields, ignore_eos=True)


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("any", "tool_choice"),
        ({"type": "function"}, "tool_choice.function"),
        ({"type": "custom", "custom": {"name": "f"}}, "tool_choice.type"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}, "tool_choice.allowed_tools.tools"),
    ],
)
def test_a_choice_that_is_none_is_named(choice: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_chat_request(_body(tools=_TOOLS, tool_choice=choice))
    assert caught.value.param == param


def test_a_refused_value_is_shown_in_short() -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_chat_request(_body(tools=["x" * 10_000]))
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 0},
        {"frequency_penalty": 0.0},
        {"presence_penalty": 0},
        {"function_call": "none"},
        {"function_call": "auto"},
        {"functions": []},
        {"logit_bias": {}},
        {"modalities": ["text"]},
        {"n": 1},
        {"response_format": {"type": "text"}},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"tools": []},
        {"use_beam_search": False, "include_stop_str_in_output": False, "skip_special_tokens": True},
        {"repetition_penalty": 1, "bad_words": [], "stop_token_ids": [], "ignore_eos": False},
        {"min_tokens": 0},
        {"stream_options": None},
        {"logprobs": False},
        {"messages": [USER | {"tool_calls": [], "name": "ann"}]},
        {"stop": []},
        {"stop": [str(n) for n in range(16)]},
        {"stop": "x" * 1000},
    ],
)
def test_harmless_values_are_accepted(model: ServedModel, fields: dict[str, Any]) -> None:
    plain = _prepare(model)
    assert _prepare(model, **fields).sampling == plain.sampling


_OPTIONAL = sorted(set(parse_chat_request(_body()).__struct_fields__) - {"model", "messages"})


@pytest.mark.parametrize("name", _OPTIONAL)
def test_null_means_absent(model: ServedModel, name: str) -> None:
    assert _prepare(model, **{name: None}) == _prepare(model)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "ann", "store": False, "metadata": {}, "service_tier": "auto"},
        {"some_vendors_field": {"enable_thinking": False}},
        {"repetition": 1.1, "x": [None, 1e300, {"": []}]},
        {"messages": [USER | {"cache_control": {"type": "ephemeral"}}]},
        {"stream": False, "Temperature": "hot"},
    ],
)
def test_unknown_fields_are_ignored(model: ServedModel, fields: dict[str, Any]) -> None:
    assert _prepare(model, **fields) == _prepare(model)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"{]",
        b"nonsense",
        b"\x00",
        b"\xff\xfe",
        _body()[:-1],
        _body() + b"x",
        _body() + _body(),
        b"\xef\xbb\xbf" + _body(),
        _body().decode().encode("utf-16"),
        _body().replace(b"hi", b"\xff"),
        _body().replace(b"hi", b"\xed\xa0\x80"),
        _body().replace(b"hi", b"\\ud800"),
        _body().replace(b"hi", b"\\udc00\\ud800"),
        _body(temperature=float("nan")),
        _body(temperature=float("inf")),
        _body().replace(b"hi", b"\n"),
    ],
)
def test_a_body_that_is_not_json(body: bytes) -> None:
    with pytest.raises(BadRequestError, match="the request body is not JSON") as caught:
        parse_chat_request(body)
    assert (caught.value.code, caught.value.param) == ("invalid_json", None)


@pytest.mark.parametrize("body", [b"null", b"1", b'"x"', b"[]", b"[{}]", b"[" * 100_000])
def test_a_body_that_is_not_an_object(body: bytes) -> None:
    with pytest.raises(BadRequestError, match=r"^request body: Expected `object`") as caught:
        parse_chat_request(body)
    assert caught.value.param is None


@pytest.mark.parametrize(
    ("number", "param"),
    [
        ("1e999", "temperature"),
        ("-1e999", "min_p"),
        ("9" * 5000, "seed"),
        ("9" * 5000, "max_tokens"),
        ("9" * 5000, "n"),
    ],
)
def test_numbers_out_of_all_range(number: str, param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_chat_request(_body(**{param: 0}).replace(b": 0}", f": {number}}}".encode()))
    assert caught.value.param == param


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_OPTIONAL), inner, max_size=3)
    ),
    max_leaves=4,
)
_fields = st.dictionaries(st.sampled_from([*_OPTIONAL, "model", "messages"]), _json_values, max_size=4)


@given(fields=_fields)
def test_any_fields_pass_or_are_bad_requests(fields: dict[str, Any]) -> None:
    try:
        parse_chat_request(_body(**fields))
    except BadRequestError as error:
        assert error.code == "invalid_json" or error.param is not None


@given(body=st.binary(max_size=40))
def test_any_bytes_are_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequestError):
        parse_chat_request(body)


def test_roles_and_contents_reach_the_template(model: ServedModel) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}]
    prompt = _prompt(
        model,
        {"role": "developer", "content": "d"},
        {"role": "system", "content": "s"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "user", "content": []},
    )
    assert prompt == "<|system|>d<|system|>s<|user|>ab<|assistant|><|assistant|><|user|><|assistant|>"


@pytest.mark.parametrize("role", ["user", "system", "developer"])
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_only_the_assistant_may_say_nothing(model: ServedModel, role: str, content: dict[str, None]) -> None:
    with pytest.raises(BadRequestError) as caught:
        _prepare(model, messages=[USER, {"role": role, **content}])
    assert caught.value.param == "messages[1].content"


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": "data:"}}, "messages[0].content[1]"),
        ({"type": "input_audio"}, "messages[0].content[1]"),
        ({"type": "text"}, "messages[0].content[1].text"),
        ({"type": "text", "text": None}, "messages[0].content[1].text"),
    ],
)
def test_a_part_that_is_not_text(model: ServedModel, part: dict[str, Any], param: str) -> None:
    content = [{"type": "text", "text": "x"}, part]
    with pytest.raises(BadRequestError) as caught:
        _prepare(model, messages=[{"role": "user", "content": content}])
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")


def test_another_model(model: ServedModel) -> None:
    with pytest.raises(NotFoundError, match="'huge' is not served here; this is 'tiny'") as caught:
        _prepare(model, model="huge")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_the_template_refuses(model: ServedModel) -> None:
    with pytest.raises(UnprocessableError, match="that is forbidden") as caught:
        _prepare(model, messages=[{"role": "user", "content": "forbidden"}])
    assert caught.value.param == "messages"


def _filler(model: ServedModel, num_prompt_tokens: int) -> list[dict[str, str]]:
    """Messages whose prompt has that many tokens: two for the roles, the rest one a character."""
    messages = [{"role": "user", "content": "x" * (num_prompt_tokens - 2)}]
    tokenizer: Tokenizer = model.tokenizer
    assert len(tokenizer.encode(tokenizer.render_chat(messages))) == num_prompt_tokens
    return messages


@pytest.mark.parametrize("num_prompt", [4, 63])
def test_max_tokens_defaults_to_the_room_left(model: ServedModel, num_prompt: int) -> None:
    request = _prepare(model, messages=_filler(model, num_prompt))
    assert len(request.prompt_token_ids) == num_prompt
    assert request.sampling.max_tokens == 64 - num_prompt


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("asked", [1, 9, 10])
def test_max_tokens_within_the_room(model: ServedModel, name: str, asked: int) -> None:
    request = _prepare(model, messages=_filler(model, 54), **{name: asked})
    assert request.sampling.max_tokens == asked


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("asked", [11, 10**30])
def test_max_tokens_beyond_the_room(model: ServedModel, name: str, asked: int) -> None:
    with pytest.raises(BadRequestError, match="at most 10 are left") as caught:
        _prepare(model, messages=_filler(model, 54), **{name: asked})
    assert (caught.value.param, caught.value.code) == (name, "context_length_exceeded")


def test_max_completion_tokens_supersedes_max_tokens(model: ServedModel) -> None:
    assert _prepare(model, max_tokens=3, max_completion_tokens=4).sampling.max_tokens == 4


@pytest.mark.parametrize("num_prompt", [64, 65, 200])
@pytest.mark.parametrize("fields", [{}, {"max_tokens": 1}])
def test_a_prompt_that_leaves_no_room(model: ServedModel, num_prompt: int, fields: dict[str, int]) -> None:
    with pytest.raises(BadRequestError, match=f"64 tokens, and the prompt has {num_prompt}:") as caught:
        _prepare(model, messages=_filler(model, num_prompt), **fields)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (0, 0),
        (1, 1),
        (2**63 - 1, 2**63 - 1),
        (2**63, 0),
        (2**64 + 5, 5),
        (10**40, 10**40 % 2**63),
        (-1, 2**63 - 1),
        (-(2**63), 0),
        (-(10**40), -(10**40) % 2**63),
    ],
)
def test_a_seed_becomes_63_bits(model: ServedModel, asked: int, wanted: int) -> None:
    assert _prepare(model, seed=asked).sampling.seed == wanted


def test_defaults_are_the_models(model: ServedModel, end_id: int) -> None:
    request = _prepare(model)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.75, 7, 0.0)
    assert sampling.seed is None
    assert sampling.num_logprobs is None
    assert sampling.stop_token_ids == (end_id,)
    assert (request.stop_strings, request.is_stream, request.include_usage) == ((), False, False)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("temperature", 0, 0),
        ("temperature", 2, 2),
        ("top_p", 0.5, 0.5),
        ("top_p", 1, 1),
        ("top_k", 0, 0),
        ("top_k", -1, 0),
        ("top_k", 3, 3),
        ("min_p", 0.25, 0.25),
    ],
)
def test_what_is_asked_for_beats_the_default(
    model: ServedModel, name: str, value: float, wanted: float
) -> None:
    assert getattr(_prepare(model, **{name: value}).sampling, name) == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
        ({"logprobs": False}, None),
    ],
)
def test_num_logprobs(model: ServedModel, fields: dict[str, Any], wanted: int | None) -> None:
    assert _prepare(model, **fields).sampling.num_logprobs == wanted


@pytest.mark.parametrize(("stop", "wanted"), [("a", ("a",)), (["a"], ("a",)), (["a", "bc"], ("a", "bc"))])
def test_stop_strings(model: ServedModel, stop: str | list[str], wanted: tuple[str, ...]) -> None:
    assert _prepare(model, stop=stop).stop_strings == wanted


@pytest.mark.parametrize(("options", "wanted"), [(None, False), ({}, False), ({"include_usage": True}, True)])
def test_stream_options(model: ServedModel, options: dict[str, bool] | None, wanted: bool) -> None:
    request = _prepare(model, stream=True, stream_options=options)
    assert (request.is_stream, request.include_usage) == (True, wanted)


@pytest.mark.parametrize("top_k", [2**63, 2**64, 10**30])
def test_top_k_beyond_64_bits(top_k: int) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_chat_request(json.dumps(BODY | {"top_k": top_k}).encode())
    assert caught.value.param == "top_k"


@pytest.mark.parametrize("field", ["tools", "unheard_of"])
@pytest.mark.parametrize("nested", ["[" * 100_000, "[" * 994 + "]" * 994, '{"a":' * 100_000])
def test_deep_nesting(field: str, nested: str) -> None:
    """A complete value may be fine where it is ignored; RecursionError never is."""
    with contextlib.suppress(BadRequestError):
        parse_chat_request(json.dumps(BODY).encode()[:-1] + f', "{field}": {nested}}}'.encode())


def test_what_acts_on_logits_reaches_the_engine(model: ServedModel, end_id: int) -> None:
    sampling = _prepare(
        model,
        min_tokens=3,
        presence_penalty=0.5,
        frequency_penalty=-1.5,
        repetition_penalty=1.25,
        logit_bias={"65": -100, "66": 2.5},
        allowed_token_ids=[65, 66],
        stop_token_ids=[70, end_id, 70],
    ).sampling
    assert sampling.min_tokens == 3
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1.5)
    assert sampling.repetition_penalty == 1.25
    assert sampling.logit_bias == ((65, -100.0), (66, 2.5))
    assert sampling.allowed_token_ids == (65, 66)
    assert sampling.stop_token_ids == (end_id, 70)


def test_ignore_eos_leaves_only_the_requests_own_stop_tokens(model: ServedModel) -> None:
    assert _prepare(model, ignore_eos=True).sampling.stop_token_ids == ()
    assert _prepare(model, ignore_eos=True, stop_token_ids=[7]).sampling.stop_token_ids == (7,)


def test_bad_words_are_banned_with_and_without_a_space_before(model: ServedModel) -> None:
    hello, space_hello = model.tokenizer.encode("hello"), model.tokenizer.encode(" hello")
    sampling = _prepare(model, bad_words=["hello", " hello", "é"]).sampling
    assert sampling.bad_words[:2] == (hello, space_hello)
    assert len(sampling.bad_words) == 4


@pytest.mark.parametrize(("fields", "wanted"), [({}, 1), ({"n": 1}, 1), ({"n": 8}, 8)])
def test_number_of_choices(model: ServedModel, fields: dict[str, int], wanted: int) -> None:
    assert _prepare(model, **fields).num_choices == wanted


# --- thinking


THOUGHTS = [
    USER,
    {"role": "assistant", "content": "A", "reasoning_content": " R\n"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "B", "reasoning": "S"},
]


@pytest.mark.parametrize(
    ("fields", "wanted", "is_thinking"),
    [
        ({}, "</think>A<|user|>more<|assistant|><think>S</think>B<|assistant|><think>", True),
        (
            {"chat_template_kwargs": {"clear_thinking": False}},
            "<think>R</think>A<|user|>more<|assistant|><think>S</think>B<|assistant|><think>",
            True,
        ),
        (
            {"reasoning_effort": "none"},
            "</think>A<|user|>more<|assistant|><think>S</think>B<|assistant|></think>",
            False,
        ),
    ],
)
def test_thoughts_in_the_history(
    glm: ServedModel, fields: dict[str, Any], wanted: str, is_thinking: bool
) -> None:
    request = _prepare(glm, messages=THOUGHTS, **fields)
    prompt = b"".join(map(glm.tokenizer.token_bytes, request.prompt_token_ids)).decode()
    assert prompt == "[gMASK]<sop><|user|>hi<|assistant|>" + wanted
    assert (request.has_thinking, request.is_thinking) == (True, is_thinking)


def test_a_template_that_leaves_the_thought_to_the_model(model: ServedModel) -> None:
    request = _prepare(model)
    assert (request.has_thinking, request.is_thinking) == (True, False)


# --- tools


def test_tools_are_shown_to_the_model_unless_none_may_be_called(glm: ServedModel) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "é"}}]
    request = _prepare(glm, tools=tools, tool_choice="auto")
    prompt = b"".join(map(glm.tokenizer.token_bytes, request.prompt_token_ids)).decode()
    assert prompt == (
        '[gMASK]<sop><|system|>{"type": "function", "function": {"name": "f", "description": "é"}}\n'
        "<|user|>hi<|assistant|><think>"
    )
    assert request.tools is not None
    without = _prepare(glm, tools=tools, tool_choice="none")
    assert without.tools is None
    assert without.prompt_token_ids == _prepare(glm).prompt_token_ids


THOUGHTFUL = {"role": "assistant", "content": " So <|user|> is ", "reasoning_content": "Hm."}


@pytest.mark.parametrize(
    ("last", "wanted"),
    [
        (THOUGHTFUL, "<|assistant|><think>Hm.</think>So <|user|> is "),
        ({"role": "assistant", "content": "a"}, "<|assistant|></think>a"),
        ({"role": "assistant", "reasoning": "Hm."}, "<|assistant|><think>Hm.</think>"),
    ],
)
def test_the_last_message_is_gone_on_with(glm: ServedModel, last: dict[str, Any], wanted: str) -> None:
    messages = [{"role": "user", "content": "hi"}, last]
    prepared = _prepare(glm, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert glm.tokenizer.decode(prepared.prompt_token_ids) == f"[gMASK]<sop><|user|>hi{wanted}"
    (user,) = glm.tokenizer.encode("<|user|>")
    assert prepared.prompt_token_ids.count(user) == 1  # what messages hold stays text
    assert not prepared.is_thinking


def test_a_prompt_without_the_beginning_of_a_turn(glm: ServedModel) -> None:
    prepared = _prepare(glm, add_generation_prompt=False)
    assert glm.tokenizer.decode(prepared.prompt_token_ids) == "[gMASK]<sop><|user|>hi"


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        ([{"role": "user", "content": "hi"}], {}),
        ([{"role": "assistant", "content": "hi"}], {"add_generation_prompt": True}),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], {}),
    ],
)
def test_what_cannot_be_gone_on_with(messages: list[dict[str, Any]], fields: dict[str, bool]) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_chat_request(_body(messages=messages, continue_final_message=True, **fields))
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize(
    "shown", ["", "{{ message.content[:3] }}", "{{ message.content }}{{ message.content }}"]
)
def test_a_template_that_does_not_show_the_last_message(
    model: ServedModel, tmp_path: Path, shown: str
) -> None:
    write_tokenizer(tmp_path, "{% for message in messages %}" + shown + "{% endfor %}")
    other = replace(model, tokenizer=Tokenizer(tmp_path))
    with pytest.raises(UnprocessableError) as caught:
        _prepare(other, messages=[{"role": "assistant", "content": "hello"}], continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_arguments_that_the_model_tore_come_back_with_their_turn(glm: ServedModel, tmp_path: Path) -> None:
    torn = '{"city": "</arg_value><|user|>'
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": torn}}]}
    messages = [{"role": "user", "content": "hi"}, turn]
    wanted = f"<tool_call>look<arg_key>arguments</arg_key><arg_value>{torn}</arg_value></tool_call>"
    prepared = _prepare(glm, messages=messages)
    assert wanted in glm.tokenizer.decode(prepared.prompt_token_ids)
    (user,) = glm.tokenizer.encode("<|user|>")
    assert prepared.prompt_token_ids.count(user) == 1
    shown = "{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}"
    template = "{% for m in messages %}" + shown + "{% endfor %}"
    write_tokenizer(tmp_path, template)
    other = replace(glm, tokenizer=Tokenizer(tmp_path))
    assert other.tokenizer.decode(_prepare(other, messages=messages).prompt_token_ids) == torn
