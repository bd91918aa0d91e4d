"""Requests come out when their grammar is compiled, and not if they were aborted."""

from __future__ import annotations

import threading

from running import request

from nybble.engine.grammar.grammar import Grammar
from nybble.engine.grammar.grammar_queue import GrammarQueue

GRAMMAR = Grammar(kind="regex", text="a")


def test_a_request_is_held_back_until_its_grammar_is_compiled() -> None:
    may_go_on = threading.Event()

    def compile_grammar(grammar: Grammar) -> None:
        may_go_on.wait(30)

    queue = GrammarQueue(compile_grammar)
    items = [request(name, (1,), grammar=GRAMMAR) for name in "abc"]
    for item in items:
        queue.put(item, GRAMMAR)
    queue.abort("b")
    queue.abort("unknown")
    queue.wait(0.01)
    assert queue.has_work and queue.take_ready() == []
    may_go_on.set()
    ready = []
    while queue.has_work:
        queue.wait(30)
        ready += queue.take_ready()
    assert ready == [items[0], items[2]]


def test_a_request_whose_grammar_fails_comes_out_too() -> None:
    def fail(grammar: Grammar) -> None:
        raise ValueError

    queue, item = GrammarQueue(fail), request("a", (1,), grammar=GRAMMAR)
    queue.put(item, GRAMMAR)
    queue.wait(30)
    assert queue.take_ready() == [item] and not queue.has_work


def test_a_slow_grammar_leaves_a_way_for_others_and_is_compiled_once() -> None:
    may_go_on = threading.Event()
    slow, fast = Grammar(kind="regex", text="slow"), Grammar(kind="regex", text="fast")
    compiled = []

    def compile_grammar(grammar: Grammar) -> None:
        compiled.append(grammar)
        if grammar == slow:
            may_go_on.wait(30)

    queue = GrammarQueue(compile_grammar)
    items = [
        request(name, (1,), grammar=grammar) for name, grammar in zip("abc", (slow, slow, fast), strict=True)
    ]
    for item in items:
        queue.put(item, item.sampling.grammar or fast)
    queue.abort("a")
    queue.wait(30)
    assert queue.take_ready() == [items[2]]
    may_go_on.set()
    queue.wait(30)
    assert queue.take_ready() == [items[1]] and sorted(compiled, key=str) == [fast, slow]
