"""`nybble chat`: ask once, or converse, in a terminal."""

from __future__ import annotations

import sys
from typing import TextIO

from nybble.server.commands.chat_client import ChatClient, ChatClientError, Messages

_HELP = "Type a message and press Enter. /new starts over, /quit (or Ctrl-D) leaves."


def ask(client: ChatClient, question: str, temperature: float | None, out: TextIO) -> None:
    """Print the streamed answer to one question, then its speed. Raises ChatClientError."""
    messages: Messages = [{"role": "user", "content": question}]
    _print_answer(client, client.model_name(), messages, temperature, out)


def converse(client: ChatClient, temperature: float | None, out: TextIO) -> None:
    """Read messages from the terminal until its end. Raises ChatClientError at the start only."""
    model = client.model_name()
    print(f"{model}. {_HELP}", file=out)
    messages: Messages = []
    while (line := _read_line()) not in (None, "/quit"):
        if line == "/new":
            messages = []
        elif line:
            messages = _take_turn(client, model, [*messages, _user(line)], temperature, out)


def _take_turn(
    client: ChatClient, model: str, messages: Messages, temperature: float | None, out: TextIO
) -> Messages:
    """The conversation with the answer, or without the message that could not be answered."""
    try:
        answer = _print_answer(client, model, messages, temperature, out)
    except ChatClientError as error:
        print(f"\n{error}", file=sys.stderr)
        return messages[:-1]
    return [*messages, {"role": "assistant", "content": answer}]


def _print_answer(
    client: ChatClient, model: str, messages: Messages, temperature: float | None, out: TextIO
) -> str:
    answer = ""
    for piece in client.stream(model, messages, temperature):
        print(piece, end="", flush=True, file=out)
        answer += piece
    print(f"\n[{client.speed}]", file=out)
    return answer


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _read_line() -> str | None:
    """A line without its end, or None at the end of input."""
    try:
        return input("> ").strip()
    except EOFError:
        return None
