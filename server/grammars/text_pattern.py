"""JSON schema's `pattern` as a regular expression of the whole text, in Rust's syntax."""

from __future__ import annotations

import re

from nybble.server.grammars.lark_text import InexpressibleError

_MAX_LENGTH = 1 << 16
_TEXT = r"(?s:.*)"
_PIECE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)|\[(?:\\.|[^\]\\])*\]|\(\?<?[A-Za-z:=!]|.", re.DOTALL)

# ECMA's classes are narrower than Rust's, and Python's, by which most validators go, have others.
_CLASSES = {r"\d": "[0-9]", r"\w": "[A-Za-z0-9_]", r"\D": "[^0-9]", r"\W": "[^A-Za-z0-9_]", r"\/": "/"}
_WITHIN = {r"\d": "0-9", r"\w": "A-Za-z0-9_", r"\/": "/"}


def of_whole_text(pattern: str) -> str:
    """A pattern may match anywhere in a text, unless ^ and $ say otherwise.

    Raises:
        InexpressibleError: it looks around or back, has ^ or $ within a group, or is too long.
    """
    if len(pattern) > _MAX_LENGTH:
        raise InexpressibleError(f"pattern: longer than {_MAX_LENGTH} characters")
    return "|".join(_branch(branch) for branch in _branches(pattern))


def _branches(pattern: str) -> list[list[str]]:
    """The pieces of each alternative: characters, escapes and classes."""
    branches: list[list[str]] = [[]]
    depth = 0
    for piece in _PIECE.findall(pattern):
        if piece.startswith(("(?=", "(?!", "(?<=", "(?<!")) or re.fullmatch(r"\\[bB1-9]", piece):
            raise InexpressibleError(f"pattern: {piece} cannot be expressed")
        depth += piece.startswith("(") - (piece == ")")
        if depth and piece in ("^", "$"):
            raise InexpressibleError(f"pattern: {piece} within a group cannot be expressed")
        if piece == "|" and not depth:
            branches.append([])
        else:
            branches[-1].append(piece)
    return branches


def _branch(pieces: list[str]) -> str:
    is_from_start, is_to_end = pieces[:1] == ["^"], pieces[-1:] == ["$"]
    inner = pieces[is_from_start : len(pieces) - is_to_end]
    if "^" in inner or "$" in inner:
        raise InexpressibleError("pattern: ^ or $ within a text cannot be expressed")
    text = "(?:" + "".join(map(_translated, inner)) + ")"
    return ("" if is_from_start else _TEXT) + text + ("" if is_to_end else _TEXT)


def _translated(piece: str) -> str:
    if piece == ".":
        return r"[^\n\r\x{2028}\x{2029}]"
    if piece.startswith("["):
        return re.sub(r"\\(.)", lambda found: _WITHIN.get(found[0], found[0]), piece, flags=re.DOTALL)
    return _CLASSES.get(piece, piece)
