from __future__ import annotations

from nybble.engine.messages import TokenEvent
from nybble.server.text.request_timer import RequestTimer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _token(queue_time: float | None = None) -> TokenEvent:
    return TokenEvent(
        request_id="a",
        token_id=1,
        logprobs=None,
        finish_reason=None,
        num_cached_tokens=0,
        queue_time=queue_time,
    )


def test_prompt_and_answer_are_timed_apart() -> None:
    clock = Clock()
    timer = RequestTimer(clock)
    clock.now += 3.0
    timer.note_token(_token(queue_time=1.0), ends_prompt=True)
    for _ in range(4):
        clock.now += 0.5
        timer.note_token(_token(), ends_prompt=False)
    clock.now += 100
    timings = timer.timings(num_prompt=50, num_cached=10, num_completion=5)
    assert (timings.queue_ms, timings.cache_n) == (1000.0, 10)
    assert (timings.prompt_n, timings.prompt_ms) == (40, 2000.0)
    assert (timings.prompt_per_token_ms, timings.prompt_per_second) == (50.0, 20.0)
    assert (timings.predicted_n, timings.predicted_ms) == (5, 2000.0)
    assert (timings.predicted_per_token_ms, timings.predicted_per_second) == (500.0, 2.0)


def test_the_last_prompt_of_several_ends_their_time() -> None:
    clock = Clock()
    timer = RequestTimer(clock)
    for _ in range(2):
        clock.now += 1.0
        timer.note_token(_token(), ends_prompt=True)
    timings = timer.timings(num_prompt=10, num_cached=0, num_completion=2)
    assert (timings.prompt_ms, timings.predicted_ms) == (2000.0, 1000.0)


def test_without_tokens_rates_are_zero() -> None:
    timer = RequestTimer(Clock())
    timings = timer.timings(num_prompt=0, num_cached=0, num_completion=0)
    assert (timings.prompt_per_second, timings.predicted_per_second, timings.predicted_ms) == (0, 0, 0)
    timer.note_token(_token(), ends_prompt=True)
    timings = timer.timings(num_prompt=5, num_cached=5, num_completion=1)
    assert (timings.prompt_n, timings.prompt_per_token_ms, timings.predicted_per_token_ms) == (0, 0, 0)


def test_elapsed_is_since_the_request() -> None:
    clock = Clock()
    timer = RequestTimer(clock)
    clock.now += 2.5
    assert timer.elapsed == 2.5


def test_a_timeout_counts_from_the_request() -> None:
    clock = Clock()
    timer = RequestTimer(clock)
    clock.now += 2.5
    assert timer.time_left(4.0) == 1.5
    assert timer.time_left(None) is None
