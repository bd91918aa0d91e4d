"""`nybble chat`: ask once, or converse, in a terminal."""

from __future__ import annotations

import sys
from typing import TextIO

from nybble.server.commands.chat_client import Answer, ChatClient, ChatClientError, Messages, Thought

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_HELP = "Type a message and press Enter. /new starts over, /quit (or Ctrl-D) leaves."


def ask(client: ChatClient, question: str, temperature: float | None, out: TextIO) -> None:
    """Print the streamed answer to one question, then its speed. Raises ChatClientError.

    On a terminal the thought before it is printed too, dim; elsewhere it is left out.
    """
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
        turn = _print_answer(client, model, messages, temperature, out)
    except ChatClientError as error:
        print(f"\n{error}", file=sys.stderr)
        return messages[:-1]
    return [*messages, turn]


def _print_answer(
    client: ChatClient, model: str, messages: Messages, temperature: float | None, out: TextIO
) -> dict[str, str]:
    """Returns the turn. Its thought goes back with it: the chat template decides what it keeps."""
    printer = _Printer(out)
    for piece in client.stream(model, messages, temperature):
        printer.take(piece)
    printer.finish()
    print(f"\n[{client.speed}]", file=out)
    thought = {"reasoning_content": printer.thought} if printer.thought else {}
    return {"role": "assistant", "content": printer.answer} | thought


class _Printer:
    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shows_thoughts = out.isatty()
        self._is_dim = False
        self.thought = ""
        self.answer = ""

    def take(self, piece: Thought | Answer) -> None:
        match piece:
            case Thought(text):
                self.thought += text
                if self._shows_thoughts:
                    self._print(text if self._is_dim else _DIM + text)
                    self._is_dim = True
            case Answer(text):
                self.finish()
                self.answer += text
                self._print(text)

    def finish(self) -> None:
        """End a thought."""
        if self._is_dim:
            self._print(_PLAIN + "\n\n")
            self._is_dim = False

    def _print(self, text: str) -> None:
        print(text, end="", flush=True, file=self._out)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _read_line() -> str | None:
    """A line without its end, or None at the end of input."""
    try:
        return input("> ").strip()
    except EOFError:
        return None
