from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server.chat.answer_parser import AnswerParser, Content, Piece, Reasoning


def _pieces(texts: Iterable[str], is_open: bool = True, has_thinking: bool = True) -> list[Piece]:
    parser = AnswerParser(has_thinking, is_open)
    pieces = [piece for text in texts for piece in parser.feed(text)]
    return pieces + parser.finish()


def _folded(pieces: Sequence[Piece]) -> tuple[str, str]:
    """Reasoning and content."""
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    return reasoning, "".join(piece.text for piece in pieces if isinstance(piece, Content))


# Text; whether the prompt has opened the thought; reasoning; content.
CASES = [
    ("R</think>A", True, "R", "A"),
    ("\nR\n r \n</think>\n\nA \n", True, "R\n r", "A \n"),
    ("R", True, "R", ""),
    (" R \n", True, "R", ""),
    ("</think>A", True, "", "A"),
    ("</think></think>A", True, "", "A"),
    ("<think>R</think>A", True, "R", "A"),
    ("R<think>r</think>A", True, "R<think>r", "A"),
    ("R</think>A</think>B<think>C", True, "R", "A</think>B<think>C"),
    ("R</thin", True, "R</thin", ""),
    ("R</think>A<", True, "R", "A<"),
    ("", True, "", ""),
    ("\n<think>R</think>\nA", False, "R", "A"),
    ("<think></think>\n A", False, "", "A"),
    ("<think>R", False, "R", ""),
    (" A <think>R</think>", False, "", " A <think>R</think>"),
    ("\n \n", False, "", "\n \n"),
    ("\n</think>\nA", False, "", "A"),
    ("<thin", False, "", "<thin"),
    ("A < b", False, "", "A < b"),
]


@pytest.mark.parametrize(("text", "is_open", "reasoning", "content"), CASES)
def test_whole_and_at_every_split(text: str, is_open: bool, reasoning: str, content: str) -> None:
    wanted = (reasoning, content)
    assert _folded(_pieces([text], is_open)) == wanted
    assert _folded(_pieces(text, is_open)) == wanted
    for first, second in combinations(range(len(text) + 1), 2):
        assert _folded(_pieces([text[:first], text[first:second], text[second:]], is_open)) == wanted


@given(
    pieces=st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "a", "<", "</thi", "nk>", "é"])),
    data=st.data(),
    is_open=st.booleans(),
)
def test_any_text_at_any_cuts(pieces: list[str], data: st.DataObject, is_open: bool) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    cut = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert _folded(_pieces(cut, is_open)) == _folded(_pieces([text], is_open))
    reasoning, content = _folded(_pieces([text], is_open))
    assert reasoning == reasoning.strip()

    # Nothing is lost or invented but tags and white space.
    def without(text: str) -> str:
        return "".join(text.replace("<think>", "").replace("</think>", "").split())

    assert without(reasoning) + without(content) == without(text)


@given(st.text())
def test_a_model_without_thoughts_has_only_content(text: str) -> None:
    text += "\n<think>x</think>"
    assert _pieces([text], is_open=False, has_thinking=False) == [Content(text)]


def test_text_comes_as_soon_as_it_is_certain() -> None:
    parser = AnswerParser(has_thinking=True, is_open=True)
    steps = ["\n", "a", " b", " ", "\n", "</", "think>", "\n", "c", "\n", "<d"]
    assert [parser.feed(step) for step in steps] == [
        *([], [Reasoning("a")], [Reasoning(" b")], [], [], [], [], []),
        *([Content("c")], [Content("\n")], [Content("<d")]),
    ]


@pytest.mark.parametrize(("is_open", "wanted"), [(True, [True, True, False]), (False, [False, True, False])])
def test_whether_it_is_in_a_thought(is_open: bool, wanted: list[bool]) -> None:
    parser = AnswerParser(has_thinking=True, is_open=is_open)
    seen = [parser.is_thinking]
    for text in ("<think>a", "b</think>c<think>"):
        parser.feed(text)
        seen.append(parser.is_thinking)
    assert seen == wanted
