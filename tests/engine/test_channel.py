from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from nybble.engine.channel import Channel, ChannelClosedError, FrameDecoder, encode_frame
from nybble.engine.messages import Abort, Request, SamplingParams, ToEngine

ABORTS = [Abort(request_id=name) for name in ("a", "bé", "c" * 300)]
REQUEST = Request(request_id="r", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4))


@pytest.fixture
def pair() -> Iterator[tuple[Channel[ToEngine], socket.socket]]:
    """A channel, and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    with ours, theirs:
        yield Channel(ours, ToEngine), theirs


def _decoder() -> FrameDecoder[ToEngine]:
    return FrameDecoder(ToEngine)


# Frames.


def test_a_frame_is_its_length_and_a_msgpack_array() -> None:
    frame = encode_frame(ABORTS)
    assert int.from_bytes(frame[:4], "little") == len(frame) - 4
    assert msgspec.msgpack.decode(frame[4:]) == [
        {"type": "Abort", "request_id": a.request_id} for a in ABORTS
    ]


def test_frames_split_at_every_byte() -> None:
    data = encode_frame(ABORTS[:2]) + encode_frame([REQUEST])
    first_end = len(encode_frame(ABORTS[:2]))
    for split in range(len(data) + 1):
        decoder = _decoder()
        early = decoder.feed(data[:split])
        assert early == ([*ABORTS[:2]] if split >= first_end else []) + [REQUEST] * (split == len(data))
        assert early + decoder.feed(data[split:]) == [*ABORTS[:2], REQUEST]


def test_frames_byte_by_byte() -> None:
    decoder = _decoder()
    data = encode_frame(ABORTS) + encode_frame([]) + encode_frame([REQUEST])
    messages = [message for byte in data for message in decoder.feed(bytes([byte]))]
    assert messages == [*ABORTS, REQUEST]


def test_many_frames_at_once() -> None:
    assert _decoder().feed(b"".join(encode_frame([abort]) for abort in ABORTS * 50)) == ABORTS * 50


def test_messages_of_another_kind_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        _decoder().feed(encode_frame([SamplingParams(max_tokens=1)]))


# Channel.


def test_receive_waits_for_a_whole_frame(pair: tuple[Channel[ToEngine], socket.socket]) -> None:
    channel, peer = pair
    frame = encode_frame(ABORTS)

    def send_slowly() -> None:
        for part in (frame[:2], frame[2:9], frame[9:]):
            time.sleep(0.02)
            peer.sendall(part)

    thread = threading.Thread(target=send_slowly)
    thread.start()
    assert channel.receive() == ABORTS
    thread.join()


def test_receive_waits_over_empty_frames(pair: tuple[Channel[ToEngine], socket.socket]) -> None:
    channel, peer = pair
    peer.sendall(encode_frame([]) + encode_frame([REQUEST]))
    assert channel.receive() == [REQUEST]


def test_poll_does_not_wait(pair: tuple[Channel[ToEngine], socket.socket]) -> None:
    channel, peer = pair
    frame = encode_frame([REQUEST])
    start = time.monotonic()
    assert channel.poll() == []
    peer.sendall(frame[:7])
    assert channel.poll() == []
    peer.sendall(frame[7:] + encode_frame(ABORTS))
    assert channel.poll() == [REQUEST, *ABORTS]
    assert channel.poll() == []
    assert time.monotonic() - start < 1


def test_poll_and_receive_share_what_has_arrived(pair: tuple[Channel[ToEngine], socket.socket]) -> None:
    channel, peer = pair
    frame = encode_frame([REQUEST])
    peer.sendall(frame[:5])
    assert channel.poll() == []
    peer.sendall(frame[5:])
    assert channel.receive() == [REQUEST]


def test_send_reaches_the_other_end(pair: tuple[Channel[ToEngine], socket.socket]) -> None:
    channel, peer = pair
    channel.send(iter(ABORTS))
    channel.send([REQUEST])
    assert _decoder().feed(peer.recv(1 << 16)) == [*ABORTS, REQUEST]


def test_a_message_larger_than_any_socket_buffer(pair: tuple[Channel[ToEngine], socket.socket]) -> None:
    channel, peer = pair
    large = msgspec.structs.replace(REQUEST, prompt_token_ids=tuple(range(202_752)) * 5)
    frame = encode_frame([large, *ABORTS])
    assert len(frame) > 4_000_000
    thread = threading.Thread(target=peer.sendall, args=(frame,))
    thread.start()
    assert channel.receive() == [large, *ABORTS]
    thread.join()


def test_receive_and_poll_notice_the_end(pair: tuple[Channel[ToEngine], socket.socket]) -> None:
    channel, peer = pair
    peer.close()
    with pytest.raises(ChannelClosedError):
        channel.poll()
    with pytest.raises(ChannelClosedError):
        channel.receive()


def test_what_was_sent_before_the_end_is_received(pair: tuple[Channel[ToEngine], socket.socket]) -> None:
    channel, peer = pair
    peer.sendall(encode_frame(ABORTS))
    peer.close()
    assert channel.receive() == ABORTS
    with pytest.raises(ChannelClosedError):
        channel.receive()


def test_an_end_inside_a_frame_is_an_end(pair: tuple[Channel[ToEngine], socket.socket]) -> None:
    channel, peer = pair
    peer.sendall(encode_frame(ABORTS)[:-1])
    peer.close()
    with pytest.raises(ChannelClosedError):
        channel.receive()


def test_send_notices_the_end(pair: tuple[Channel[ToEngine], socket.socket]) -> None:
    channel, peer = pair
    peer.close()
    with pytest.raises(ChannelClosedError):
        channel.send(ABORTS)


def test_a_reset_is_an_end(pair: tuple[Channel[ToEngine], socket.socket]) -> None:
    """A peer that dies with unread data in its buffer resets the connection."""
    channel, peer = pair
    channel.send(ABORTS)
    peer.close()
    with pytest.raises(ChannelClosedError):
        channel.poll()
    with pytest.raises(ChannelClosedError):
        channel.receive()


def test_waiting_ends_with_data_or_the_other_side_or_time(
    pair: tuple[Channel[ToEngine], socket.socket],
) -> None:
    channel, theirs = pair
    start = time.monotonic()
    assert not channel.wait(0.05) and time.monotonic() - start > 0.04
    theirs.sendall(encode_frame([REQUEST])[:5])
    assert channel.wait(10) and channel.poll() == [] and not channel.wait(0)
    theirs.close()
    assert channel.wait(10)
    with pytest.raises(ChannelClosedError):
        channel.receive()
