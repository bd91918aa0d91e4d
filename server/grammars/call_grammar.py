"""The form of an answer that calls tools, in GLM's markup (see `ToolCallParser`).

With tool_choice "required" or a named tool the answer is calls; with "auto" it may be text, then calls, or
what `response_format` asks for instead. A call's arguments are by the tool's schema if one must be made, or
the tool is strict; without `strict`, what cannot be checked of the schema is ignored.
"""

from __future__ import annotations

from nybble.engine.grammar.grammar import Grammar, Thought
from nybble.engine.tokenizer import Tokenizer
from nybble.server.chat.tool_call_parser import CALL, CALL_TAGS, END_CALL, END_VALUE
from nybble.server.chat.tools import OfferedTool, Tools
from nybble.server.errors import BadRequestError
from nybble.server.grammars.arguments_grammar import LINE_END, ArgumentsGrammar
from nybble.server.grammars.lark_text import InexpressibleError, LarkText, literal
from nybble.server.grammars.text_language import ANY_TEXT


def call_grammar(
    tools: Tools, tokenizer: Tokenizer, thought: Thought | None, content: Grammar | None
) -> Grammar | None:
    """None if anything goes. content: the form of an answer that calls nothing.

    Raises:
        BadRequestError: what a schema asks for cannot be expressed; it names the schema.
    """
    if not tools.is_constrained and content is None:
        return None
    ids = {tag: tokenizer.encode(tag)[0] for tag in CALL_TAGS}
    rules = LarkText()
    tags = {tag: f"<[{token_id}]>" for tag, token_id in ids.items()}
    calls = [_call(rules, tags, tool, tools.is_call_required) for tool in tools.callable]
    field = "tool_choice" if tools.is_call_required else "tools"
    call = rules.add("call", f"{tags[CALL]} ({' | '.join(calls)}) {tags[END_CALL]}", field)
    several = f"{call} ({LINE_END} {call})*" if tools.is_parallel else call
    rules.set("start", _start(tools, several, rules, content), field)
    return Grammar(
        kind="calls",
        text=rules.text,
        thought=thought,
        content=None if tools.is_call_required else content,
        reserved_token_ids=(ids[CALL], ids[END_VALUE]),
        parameter=field,
        line_parameters=rules.places,
    )


def _start(tools: Tools, calls: str, rules: LarkText, content: Grammar | None) -> str:
    if tools.is_call_required:
        return f"{LINE_END} {calls}"
    if content is not None:
        return f"@content | {LINE_END} {calls}"
    return f"{rules.add('TEXT', ANY_TEXT, 'tools')} ({calls})?"


def _call(rules: LarkText, tags: dict[str, str], tool: OfferedTool, must_fit: bool) -> str:
    """A rule for what comes between the tags of a call; gives its name."""
    arguments = ArgumentsGrammar(rules, tags, tool.parameters, tool.place, is_lenient=not tool.is_strict)
    try:
        found = arguments.add() if must_fit or tool.is_strict else arguments.add_any()
    except InexpressibleError as error:
        place = error.place or tool.place
        raise BadRequestError(f"{place}: {error}", place) from error
    except RecursionError as error:
        raise BadRequestError(f"{tool.place}: nested too deep", tool.place) from error
    return rules.add("tool", f"{literal(tool.name)} {LINE_END} {found}", tool.place)
