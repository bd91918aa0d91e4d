"""Messages over a private Unix socket: length-prefixed msgpack, no pickle, no port.

A frame is a 4-byte little-endian length and a msgpack array of messages.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterable
from typing import Generic, TypeVar

import msgspec

Message = TypeVar("Message")

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()


def encode_frame(messages: Iterable[object]) -> bytes:
    body = _encoder.encode(list(messages))
    return _LENGTH.pack(len(body)) + body


class FrameDecoder(Generic[Message]):
    """Turns bytes as they arrive into messages. `kind` is the union of message types."""

    def __init__(self, kind: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[Message]] = msgspec.msgpack.Decoder(list[kind])  # type: ignore[valid-type]
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages of all frames that `data` completes."""
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                break
            messages += self._decoder.decode(memoryview(self._buffer)[_LENGTH.size : end])
            del self._buffer[:end]
        return messages


class ChannelClosedError(Exception):
    """The other side is gone."""


class Channel(Generic[Message]):
    """The engine's end. `receive` waits; `poll` does not."""

    def __init__(self, sock: socket.socket, kind: object) -> None:
        self._socket = sock
        self._decoder: FrameDecoder[Message] = FrameDecoder(kind)

    def send(self, messages: Iterable[object]) -> None:
        """Raises ChannelClosedError."""
        try:
            self._socket.sendall(encode_frame(messages))
        except OSError as error:
            raise ChannelClosedError from error

    def wait(self, seconds: float) -> bool:
        """Whether something comes within that time: a message, part of one, or the end."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(seconds * 1e3))

    def receive(self) -> list[Message]:
        """Wait for messages, without using the CPU. Raises ChannelClosedError."""
        while not (messages := self._read(0)):
            pass
        return messages

    def poll(self) -> list[Message]:
        """The messages that have arrived, if any. Raises ChannelClosedError."""
        messages: list[Message] = []
        try:
            while True:
                messages += self._read(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return messages

    def _read(self, flags: int) -> list[Message]:
        try:
            data = self._socket.recv(1 << 16, flags)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ChannelClosedError from error
        if not data:
            raise ChannelClosedError
        return self._decoder.feed(data)
