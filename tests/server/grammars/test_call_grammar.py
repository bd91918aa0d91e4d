"""Calls that a model which knows nothing makes under a grammar: read by our parser, they fit the schema."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import jsonschema
import msgspec
import pytest
from glm_model import glm_model
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from random_answer import EndlessError, ids, random_answer

from nybble.engine.errors import InvalidRequestError
from nybble.engine.grammar.grammar import Grammar, Thought
from nybble.engine.grammar.grammar_compiler import GrammarCompiler
from nybble.server.chat.answer_parser import AnswerParser, Content, Reasoning
from nybble.server.chat.tool_call_parser import CallStart
from nybble.server.chat.tools import Tools, check_tools, offered_tools
from nybble.server.errors import BadRequestError
from nybble.server.grammars.call_grammar import call_grammar
from nybble.server.requests.schemas import ChatCompletionRequest
from nybble.server.served_model import ServedModel

Call = tuple[str, Any]


class Caller:
    """A model with GLM's tags and the grammars for its tokens."""

    def __init__(self, directory: Any) -> None:
        self.model: ServedModel = glm_model(directory)
        self.compiler = GrammarCompiler(directory)

    def id(self, tag: str) -> int:
        return self.model.tokenizer.encode(tag)[0]

    def offered(self, definitions: Sequence[Any], **fields: Any) -> Tools:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": definitions} | fields
        request = msgspec.convert(body, ChatCompletionRequest)
        check_tools(request)
        tools = offered_tools(request, self.model.tokenizer)
        assert tools is not None
        return tools

    def grammar(
        self, tools: Tools, content: Grammar | None = None, thought: Thought | None = None
    ) -> Grammar:
        grammar = call_grammar(tools, self.model.tokenizer, thought, content)
        assert grammar is not None
        return grammar

    def answer(self, grammar: Grammar, seed: int, num_tokens: int = 40) -> str:
        """Any that the grammar allows."""
        end = self.id("<|user|>")
        state = self.compiler.start(grammar, (end,))
        tags = ("</arg_key>", "</arg_value>", "</tool_call>", "<tool_call>", "</think>")
        closing = [*map(self.id, tags), *b'"]}5/b@']
        token_ids = random_answer(
            state, random.Random(seed), end, num_tokens, closing, {self.id(tag): 9 for tag in tags}
        )
        return b"".join(map(self.model.tokenizer.token_bytes, token_ids)).decode()

    def calls(self, tools: Tools, text: str) -> tuple[str, list[Call]]:
        """The content and the calls of an answer."""
        parser = AnswerParser(has_thinking=True, is_open="</think>" in text, calls=tools.call_rules())
        names, arguments, content = list[str](), list[str](), ""
        for piece in [*parser.feed(text), *parser.finish()]:
            match piece:
                case CallStart(name):
                    names.append(name)
                    arguments.append("")
                case Content(part):
                    content += part
                case Reasoning():
                    pass
                case _:
                    arguments[-1] += piece.text
        return content, list(zip(names, map(json.loads, arguments), strict=True))


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Caller:
    return Caller(tmp_path_factory.mktemp("glm"))


def tool(name: str, parameters: Any = None, **fields: Any) -> dict[str, Any]:
    function = {"name": name} | fields | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function}


def closed(properties: dict[str, Any], *required: str, **fields: Any) -> dict[str, Any]:
    shape = {"type": "object", "properties": properties, "required": list(required)} | fields
    return {"additionalProperties": False} | shape


def _nested_arrays(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


_REFERENCE = {"$ref": "#/$defs/large"}
_LARGE = {"$defs": {"large": {"type": "array", "items": {"enum": [f"value {n}" for n in range(2000)]}}}}


def check(arguments: Any, schema: Any) -> None:
    jsonschema.Draft202012Validator(schema).validate(arguments)


_names = st.sampled_from(["a", "b", "city name", 'qu"ote', "ü", "good", "x<y", "$ref", "enum", ""])
_values = st.one_of(
    st.integers(-9, 9),
    st.text(max_size=4),
    st.none(),
    st.booleans(),
    st.sampled_from(["3", "null", "[1]", " x"]),
)
_leaves = st.one_of(
    st.just({}),
    st.just(True),
    st.sampled_from(
        [{"type": t} for t in ("string", "integer", "number", "boolean", "null", "object", "array")]
    ),
    st.sampled_from([{"type": t} for t in (["string", "integer"], ["string", "null"], ["number", "array"])]),
    st.tuples(st.integers(-50, 50), st.integers(0, 50)).map(
        lambda t: {"type": ["integer", "string"], "minimum": t[0], "maximum": t[0] + t[1]}
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 5)).map(lambda t: {"minLength": t[0], "maxLength": sum(t)}),
    st.tuples(st.integers(0, 3), st.integers(0, 5)).map(
        lambda t: {"type": "string", "minLength": t[0], "maxLength": sum(t)}
    ),
    st.lists(_values, min_size=1, max_size=5).map(lambda values: {"enum": values}),
    _values.map(lambda value: {"const": value}),
    st.sampled_from(
        [{"type": "string", "pattern": p} for p in ("^[a-f]{2,4}$", "^(x|yz)+$", "[0-9]/", "^a|b$")]
    ),
    st.sampled_from([{"type": ["string", "null"], "format": f} for f in ("date", "uuid", "ipv4", "email")]),
    st.sampled_from([{"$ref": "#/$defs/tree"}, {"$ref": "#/$defs/word"}, {"$ref": "#/$defs/either"}]),
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(_names, inner, max_size=3)
    return st.one_of(
        properties.map(lambda found: closed(found, *list(found)[:2])),
        inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    )


_schemas = st.recursive(_leaves, _nested, max_leaves=5)
_DEFINITIONS = {
    "tree": closed({"name": {"type": "string"}, "next": {"$ref": "#/$defs/tree"}}, "name"),
    "word": {"type": "string", "maxLength": 4},
    "either": {"anyOf": [{"$ref": "#/$defs/word"}, {"type": "integer"}, {"type": "null"}]},
}


@st.composite
def _parameters(draw: st.DrawFn) -> dict[str, Any]:
    properties = draw(st.dictionaries(_names, _schemas, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    others = draw(
        st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "integer"}}])
    )
    return {"type": "object", "$defs": _DEFINITIONS, "properties": properties, "required": required} | others


def check_calls(caller: Caller, parameters: list[dict[str, Any]], seed: int, data: st.DataObject) -> None:
    """Of one answer with strict tools of these parameters."""
    schemas = dict(zip(("get", "get_more"), parameters, strict=False))
    is_parallel = data.draw(st.booleans())
    tools = caller.offered(
        [tool(name, schema, strict=True) for name, schema in schemas.items()],
        tool_choice=data.draw(st.sampled_from(["required", "auto"])),
        parallel_tool_calls=is_parallel,
    )
    text = caller.answer(caller.grammar(tools), seed)
    _, calls = caller.calls(tools, text)
    assert len(calls) <= 1 or is_parallel
    assert calls or not tools.is_call_required
    assert text.count("<tool_call>") == len(calls)
    for name, arguments in calls:
        check(arguments, schemas[name])


_asked = given(
    parameters=st.lists(_parameters(), min_size=1, max_size=2), seed=st.integers(0, 2**32), data=st.data()
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@_asked
def test_calls_by_generated_schemas_are_valid(
    caller: Caller, parameters: list[dict[str, Any]], seed: int, data: st.DataObject
) -> None:
    check_calls(caller, parameters, seed, data)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@_asked
def test_calls_by_many_generated_schemas_are_valid(
    caller: Caller, parameters: list[dict[str, Any]], seed: int, data: st.DataObject
) -> None:
    try:
        check_calls(caller, parameters, seed, data)
    except EndlessError:
        reject()


def accepts(caller: Caller, grammar: Grammar, text: str) -> bool:
    """Whether an answer of this text may come, tags as tokens."""
    state = caller.compiler.start(grammar, (caller.id("<|user|>"),))
    for token_id in (*caller.model.tokenizer.encode(text), caller.id("<|user|>")):
        words = state.allowed_words()
        assert words is not None and state.failure is None
        if token_id not in ids(words):
            return False
        state.append(token_id)
    return True


def call(name: str, /, **arguments: str) -> str:
    """In the markup of GLM-4.7."""
    pairs = (f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in arguments.items())
    return f"<tool_call>{name}{''.join(pairs)}</tool_call>"


def older_call(name: str, /, **arguments: str) -> str:
    """In that of GLM-4.5 and 4.6."""
    pairs = (
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items()
    )
    return f"\n<tool_call>{name}\n{''.join(pairs)}</tool_call>"


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "string"}, ["", "3", " x ", "a\nb", "<arg>", 'a"b'], []),
        ({"type": "string", "maxLength": 2}, ["", "ü\n"], ["abc"]),
        ({"type": "string", "enum": ["a", "", "3"]}, ["a", "", "3"], ["b", '"a"', "4"]),
        ({"type": "string", "pattern": "b|^a$"}, ["a", "xby"], ["aa", ""]),
        ({"type": "string", "format": "date"}, ["2024-02-29", "1999-12-31"], ["2023-02-29", "2024-13-01"]),
        ({"type": "string", "not": {"enum": ["no"]}}, ["yes", "nono"], ["no"]),
        (
            {"oneOf": [{"enum": ["a", "b"]}, {"type": "string", "pattern": "^b|c$"}]},
            ["a", "c", "bx"],
            ["b", "x"],
        ),
        ({"type": "integer", "maximum": 5}, ["5", "-10"], ["6", "5.5", "five", ""]),
        (
            {"type": ["integer", "string"], "maximum": 5},
            ["5", "7 apples", "five"],
            ["7", " 7 ", "1e9", '"7"'],
        ),
        ({"type": ["string", "null"]}, ["null", "3", "nullify", '"a" or b'], [" null ", '"null"']),
        ({"type": ["string", "boolean"]}, ["true", "truth", "null"], [" true"]),
        ({"type": ["array", "string"], "items": {"type": "integer"}}, ["[1, 2]", "x[1]"], ["[1, a]", " [1]"]),
        ({"anyOf": [{"type": "object", "maxProperties": 0}, {"type": "string"}]}, ["{}", "a{"], ['{"a": 1}']),
        ({}, ["3", "a", "[1]", "null"], []),
        ({"$ref": "#/$defs/either"}, ["7", "null", "four"], ["fives", " 7"]),
        ({"type": "array", "items": {"type": "string"}}, ['["a"]', '["<b>"]'], ['["</arg_value>"]']),
        ({"type": "string", "nullable": True}, ["a", ""], ["null"]),
    ],
)
def test_values_of_an_argument(
    caller: Caller, schema: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    parameters = closed({"a": schema}, "a", **{"$defs": _DEFINITIONS})
    tools = caller.offered([tool("get", parameters, strict=True)], tool_choice="required")
    grammar = caller.grammar(tools)
    assert [value for value in right if not accepts(caller, grammar, call("get", a=value))] == []
    assert [value for value in wrong if accepts(caller, grammar, call("get", a=value))] == []
    for value in right:
        _, [(_, arguments)] = caller.calls(tools, call("get", a=value))
        check(arguments, parameters)


CITY = closed({"city": {"type": "string"}, "days": {"type": "integer"}}, "city")
WEATHER, TIME = tool("weather", CITY, strict=True), tool("time")
PARIS = call("weather", city="Paris", days="3")


@pytest.mark.parametrize("write", [call, older_call])
def test_a_call_is_required(caller: Caller, write: Any) -> None:
    grammar = caller.grammar(caller.offered([WEATHER, TIME], tool_choice="required"))
    paris = write("weather", city="Paris", days="3")
    right = [paris, write("time"), paris + write("time") + paris, write("weather", city="")]
    wrong = [
        *("", "text", "text" + paris, paris + "text"),
        *(write("dates"), write("weather"), write("weather", days="3"), write("time", city="Paris")),
        write("weather", days="3", city="Paris"),
        write("weather", city="Paris", days="three"),
        write("weather", city="Paris", country="France"),
    ]
    assert [text for text in right if not accepts(caller, grammar, text)] == []
    assert [text for text in wrong if accepts(caller, grammar, text)] == []
    assert grammar.parameter == "tool_choice"


def test_one_call(caller: Caller) -> None:
    named = {"type": "function", "function": {"name": "time"}}
    for fields in ({"tool_choice": named}, {"tool_choice": "required", "parallel_tool_calls": False}):
        grammar = caller.grammar(caller.offered([WEATHER, TIME], **fields))
        assert accepts(caller, grammar, call("time"))
        assert not accepts(caller, grammar, call("time") + call("time"))
        assert accepts(caller, grammar, PARIS) is (fields["tool_choice"] == "required")


def test_some_tools_are_allowed(caller: Caller) -> None:
    only = {"tools": [{"type": "function", "function": {"name": "time"}}]}
    for mode in ("auto", "required"):
        choice = {"type": "allowed_tools", "allowed_tools": only | {"mode": mode}}
        grammar = caller.grammar(caller.offered([WEATHER, TIME], tool_choice=choice))
        assert accepts(caller, grammar, call("time") * 2)
        assert not accepts(caller, grammar, PARIS)
        assert accepts(caller, grammar, "text") is (mode == "auto")


def test_text_then_calls_that_fit_where_they_are_strict(caller: Caller) -> None:
    loose = tool("note", closed({"text": {"type": "string"}}, "text"))
    grammar = caller.grammar(caller.offered([WEATHER, TIME, loose]))
    right = [
        "",
        "so < it\n",
        "so" + PARIS,
        PARIS + "\n" + PARIS,
        call("note"),
        call("note", other="3", text=""),
    ]
    wrong = [PARIS + "text", "so" + call("weather"), call("dates"), "<tool_call>", "so" + PARIS[:-1]]
    assert [text for text in right if not accepts(caller, grammar, text)] == []
    assert [text for text in wrong if accepts(caller, grammar, text)] == []


def test_without_strict_tools_anything_goes(caller: Caller) -> None:
    tools = caller.offered([TIME, tool("note", {"type": "object", "not": {}})])
    assert call_grammar(tools, caller.model.tokenizer, None, None) is None


def test_tags_are_not_spelled(caller: Caller) -> None:
    grammar = caller.grammar(
        caller.offered([WEATHER, tool("note", closed({"a": {"type": "array"}}), strict=True)])
    )
    city, array = PARIS[: PARIS.index("ris")], call("note", a='["x')[: -len("</arg_value></tool_call>")]
    tags = ("<tool_call>", "</arg_value>")
    for text, tag in [("so", "<tool_call>"), *product((city, array), tags)]:
        state = caller.compiler.start(grammar, (caller.id("<|user|>"),))
        for token_id in (*caller.model.tokenizer.encode(text), *tag[:-1].encode()):
            words = state.allowed_words()
            assert words is not None and token_id in ids(words)
            state.append(token_id)
        words = state.allowed_words()
        assert words is not None and ord(">") not in ids(words) and ord("x") in ids(words)


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_of_a_form_or_a_call(caller: Caller, seed: int) -> None:
    schema = closed({"said": {"type": "string"}}, "said")
    content = Grammar(kind="json_schema", text=json.dumps(schema), parameter="response_format")
    tools = caller.offered([WEATHER, tool("note", closed({"text": {"type": "string"}}, "text"))])
    grammar = caller.grammar(tools, content)
    assert accepts(caller, grammar, '{ "said": "<b>"}') and accepts(caller, grammar, PARIS + call("note"))
    assert not any(accepts(caller, grammar, text) for text in ("text", '{"said": 1}', '{"said": ""}' + PARIS))
    said, calls = caller.calls(tools, caller.answer(grammar, seed))
    assert bool(said) is not bool(calls)
    if said:
        check(json.loads(said), schema)
    regex = Grammar(kind="regex", text="a/b", parameter="guided_regex")
    assert accepts(caller, caller.grammar(tools, regex), "a/b")
    required = caller.offered([WEATHER], tool_choice="required")
    assert caller.grammar(required, content).content is None


@pytest.mark.parametrize("is_open", [True, False])
def test_calls_come_after_the_thought(caller: Caller, is_open: bool) -> None:
    """Which cannot call; a model that may think or not can call at once."""
    start, end = caller.id("<think>"), caller.id("</think>")
    thought = Thought(end_token_id=end, start_token_id=None if is_open else start)
    grammar = caller.grammar(caller.offered([WEATHER], tool_choice="required"), thought=thought)
    opening = "" if is_open else "\n<think>"
    assert accepts(caller, grammar, f"{opening}so</think>{PARIS}")
    assert not accepts(caller, grammar, f"{opening}so{PARIS}</think>{PARIS}")
    assert not accepts(caller, grammar, f"{opening}so")
    assert accepts(caller, grammar, "\n" + PARIS) is not is_open


@pytest.mark.parametrize(
    ("parameters", "place", "message"),
    [
        ({"type": "array"}, "", "arguments are an object"),
        (closed({"a": {"$ref": "#/nowhere"}}), ".properties.a", "leads nowhere"),
        (closed({"a": {"$ref": "other.json"}}), ".properties.a", "only references within the schema"),
        (closed({"a": {"type": "string", "pattern": "(?=a)"}}), ".properties.a", "pattern"),
        (closed({"a": {"type": "string", "pattern": "(a"}}), ".properties.a", "unclosed group"),
        (closed({"a": {"type": "string", "format": "colour"}}), ".properties.a", "'colour'"),
        (closed({"a": {"type": "array", "uniqueItems": True}}), ".properties.a", "uniqueItems"),
        (closed({"a": {"enum": []}}), ".properties.a", ""),
        (closed({"a": {"const": "</arg_value>"}}), ".properties.a", "no value is allowed"),
        (closed({" a": {}}), ".properties. a", "cannot be written"),
        (closed({}, "a"), "", "'a' is required and must not be there"),
        (closed({}, minProperties=1), "", "minProperties"),
        ({"$ref": "#"}, "", "refers to itself"),
        (closed({"a": {"oneOf": [{"pattern": "x" * 999}] * 99}}), ".properties.a", "too many alternatives"),
        (closed({"a": {"pattern": "x" * 2_000_000}}), ".properties.a", "longer than"),
        (closed(dict.fromkeys(map(str, range(99)), _REFERENCE), **_LARGE), ".properties.", "more than"),
        (closed({"a": _nested_arrays(3000)}), "", "nested too deep"),
        (closed({"a": {"$ref": "#/properties/a"}}), ".properties.a", ""),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(
    caller: Caller, parameters: dict[str, Any], place: str, message: str
) -> None:
    tools = caller.offered([TIME, tool("get", parameters, strict=True)])
    with pytest.raises((BadRequestError, InvalidRequestError)) as caught:
        caller.compiler.start(caller.grammar(tools), (caller.id("<|user|>"),))
    param = caught.value.param if isinstance(caught.value, BadRequestError) else caught.value.parameter
    assert param and param.startswith(f"tools[1].function.parameters{place}")
    assert message in str(caught.value)


def test_without_strict_what_cannot_be_checked_is_ignored(caller: Caller) -> None:
    parameters = closed(
        {
            "a": {"type": "string", "format": "colour"},
            "b": {"type": "array", "uniqueItems": True},
            "c": {"type": "string", "pattern": "(?=a)"},
        },
        minProperties=1,
    )
    grammar = caller.grammar(caller.offered([tool("get", parameters)], tool_choice="required"))
    assert accepts(caller, grammar, call("get", a="red", b="[1,1]", c="b"))
    assert not accepts(caller, grammar, call("get", b="{}"))


@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        (None, [{}], [{"a": "1"}]),
        ({"type": "object"}, [{}, {"a": "1", "b": "x"}], [{" a": "1"}]),
        ({"properties": {"a": {}}}, [{}, {"a": "1"}], [{"b": "1"}, {"a": "1", "b": "1"}]),
        (
            {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
            [{"a": "x", "b": "1"}],
            [{"b": "x"}, {"b": "1", "a": "1"}],
        ),
        ({"required": ["b"], "properties": {"a": {}}}, [{"b": "x"}, {"a": "", "b": ""}], [{"a": "1"}]),
        (
            {"allOf": [closed({"a": {"type": "integer"}}, additionalProperties=True), {"required": ["a"]}]},
            [{"a": "1"}],
            [{}, {"a": "x"}],
        ),
        (
            {"anyOf": [closed({"a": {"type": "string"}}, "a"), closed({"b": {"type": "integer"}}, "b")]},
            [{"a": "5"}, {"a": ""}, {"b": "5"}],
            [{"b": "x"}, {}],
        ),
        (
            {"anyOf": [closed({"a": {"const": 1}}, "a"), closed({"b": {"const": 2}}, "b")]},
            [{"a": "1"}, {"b": "2"}],
            [{}, {"a": "2"}, {"a": "1", "b": "2"}],
        ),
        ({"$ref": "#/$defs/tree", "$defs": _DEFINITIONS}, [{"name": "x", "next": '{"name": "y"}'}], [{}]),
    ],
)
def test_which_arguments_there_may_be(
    caller: Caller, parameters: Any, right: list[dict[str, str]], wrong: list[dict[str, str]]
) -> None:
    tools = caller.offered([tool("get", parameters, strict=True)], tool_choice="required")
    grammar = caller.grammar(tools)
    assert [each for each in right if not accepts(caller, grammar, call("get", **each))] == []
    assert [each for each in wrong if accepts(caller, grammar, call("get", **each))] == []
    for each in right:
        _, [(_, arguments)] = caller.calls(tools, call("get", **each))
        check(arguments, parameters or closed({}))


_KEYWORDS = (
    *(
        "type",
        "properties",
        "required",
        "additionalProperties",
        "$ref",
        "$defs",
        "enum",
        "const",
        "not",
        "if",
    ),
    *(
        "anyOf",
        "oneOf",
        "allOf",
        "items",
        "pattern",
        "format",
        "minLength",
        "maxLength",
        "minimum",
        "nullable",
    ),
)
_junk = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(-3, 3), st.floats(allow_nan=False, allow_infinity=False)),
        st.sampled_from(["", "a", "string", "object", "#", "#/$defs/a", "^a", "(", "date", "</arg_value>"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*_KEYWORDS, "a"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(parameters=st.dictionaries(st.sampled_from(_KEYWORDS), _junk, max_size=4), is_strict=st.booleans())
def test_parameters_that_make_no_sense_are_refused_or_followed(
    caller: Caller, parameters: dict[str, Any], is_strict: bool
) -> None:
    tools = caller.offered([tool("get", parameters, strict=is_strict)], tool_choice="required")
    try:
        grammar = call_grammar(tools, caller.model.tokenizer, None, None)
    except BadRequestError as error:
        assert error.param and error.param.startswith("tools[0].function.parameters")
        return
    assert grammar is not None
    fault = caller.compiler.fault(grammar)
    assert fault is None or fault.parameter.startswith(("tools[0].function.parameters", "tool"))
