from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest
from canned_server import refusing_url
from paced_server import HEAD, Script, end_events, event, paced_server, text_event

from nybble.engine.errors import OptionError
from nybble.server.bench.timed_request import Target, Timing, send_timed

ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
PAUSE = 0.05


def _send(script: Script, key: str | None = None) -> tuple[Timing, str]:
    async def run() -> tuple[Timing, str]:
        async with paced_server(script) as server:
            timing = Timing(time.monotonic())
            await send_timed(Target.parse(server.url, key), b"{}", timing)
            return timing, server.heads[0]

    return asyncio.run(run())


def test_times_are_those_of_the_chunks_with_output() -> None:
    thought = event({"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]})
    script = [PAUSE, HEAD + ROLE, PAUSE, thought, PAUSE, text_event("a"), PAUSE, end_events(7, 9)]
    timing, _ = _send(script)
    assert timing.error is None
    assert (timing.num_prompt_tokens, timing.num_output_tokens) == (7, 9)
    assert timing.first_byte is not None and len(timing.output_times) == 2
    moments = [timing.sent, timing.first_byte, *timing.output_times, timing.end]
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    assert all(gap >= PAUSE - 0.01 for gap in gaps) and moments[-1] - moments[0] < 10


def test_cached_tokens_are_counted() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4}}
    timing, _ = _send([HEAD, text_event("x"), event({"usage": usage}), b"data: [DONE]\n\n"])
    assert timing.error is None and timing.num_cached_tokens == 4


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([HEAD, text_event("a"), event({"usage": {"completion_tokens": 1}})], "without [DONE]"),
        ([HEAD, text_event("a"), b"data: [DONE]\n\n"], "no usage in the stream"),
        ([HEAD, ROLE, end_events(1, 1)], "the answer is empty"),
        ([HEAD, event({"error": {"message": "boom"}}), b"data: [DONE]\n\n"], "in the stream: boom"),
        ([HEAD, b"data: {nonsense\n\n"], "not a stream of chat completions"),
        ([HEAD, event({"choices": [{"delta": {"content": 5}}]})], "not a stream of chat completions"),
        ([b"what\r\n\r\n"], "not an HTTP/1.1 response"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n"], "before the response did"),
        ([b'HTTP/1.1 429 No\r\n\r\n{"error": {"message": "slower"}}'], "HTTP 429: slower"),
        ([b"HTTP/1.1 502 No\r\n\r\nbad gateway"], "HTTP 502: bad gateway"),
    ],
)
def test_what_goes_wrong_is_told(script: Script, message: str) -> None:
    timing, _ = _send(script)
    assert timing.error is not None and message in timing.error
    assert timing.end >= timing.sent > 0


def test_nobody_there() -> None:
    with refusing_url() as url:
        timing = Timing(time.monotonic())
        asyncio.run(send_timed(Target.parse(url), b"{}", timing))
    assert timing.error is not None and timing.error.startswith("cannot connect: ")


def test_given_up_it_hangs_up() -> None:
    async def run() -> Timing:
        timing = Timing(time.monotonic())
        async with paced_server([HEAD, text_event("a"), 30.0]) as server:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(send_timed(Target.parse(server.url), b"{}", timing), 0.3)
        return timing

    timing = asyncio.run(run())
    assert timing.error == "not finished when the time was up" and timing.end > timing.sent


def test_the_key_goes_along() -> None:
    script = [HEAD, text_event("a"), end_events(1, 1)]
    assert "\r\nAuthorization: Bearer secret\r\n" in _send(script, "secret")[1]
    assert "Authorization" not in _send(script)[1]


def test_targets() -> None:
    assert Target.parse("http://host") == Target("host", 80, "/v1", False, None)
    assert Target.parse("https://host:1234/api/v2/") == Target("host", 1234, "/api/v2", True, None)
    assert Target.parse("http://[::1]:8000").url("/models") == "http://[::1]:8000/v1/models"
    assert "secret" not in repr(Target.parse("http://host", "secret"))


@pytest.mark.parametrize("url", ["host", "ftp://host", "http://", "http://host:99999"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(OptionError, match="url: "):
        Target.parse(url)


def test_a_key_that_would_break_the_header() -> None:
    with pytest.raises(OptionError, match="no header can hold"):
        Target.parse("http://host", "a\r\nb")
