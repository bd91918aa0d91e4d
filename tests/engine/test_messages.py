from __future__ import annotations

import msgspec
import pytest

from nybble.engine.channel import FrameDecoder, encode_frame
from nybble.engine.engine_config import CacheConfig, EngineConfig, SchedulerConfig
from nybble.engine.engine_stats import Gauges, StatsRecorder
from nybble.engine.messages import (
    Abort,
    EngineFailed,
    EngineReady,
    FromEngine,
    PromptLogprobs,
    Request,
    RequestAccepted,
    RequestFailed,
    RequestRefused,
    SamplingParams,
    ToEngine,
    TokenEvent,
    TokenLogprobs,
)

CONFIG = EngineConfig(
    checkpoint="/models/GLM-4.7 é",
    device="cpu",
    dtype="float32",
    max_model_len=4096,
    cache=CacheConfig(block_size=8, kv_cache_memory=1.5, enable_prefix_caching=False),
    scheduler=SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=99),
)
SAMPLING = SamplingParams(
    max_tokens=7,
    temperature=0.7,
    top_k=40,
    top_p=0.95,
    min_p=0.05,
    seed=2**63 - 1,
    stop_token_ids=(151329, 151336),
    num_logprobs=5,
)
TO_ENGINE = [
    Request(request_id="r", prompt_token_ids=(0, 1, 151_551), sampling=SAMPLING),
    Request(request_id="q", prompt_token_ids=(1,), sampling=SAMPLING, priority=-1, tenant="é", deadline=0.5),
    Request(request_id="", prompt_token_ids=(), sampling=SamplingParams(max_tokens=1)),
    Abort(request_id="r"),
]
FROM_ENGINE = [
    EngineReady(config=CONFIG, vocab_size=151_552, max_model_len=4096, eos_token_ids=(1, 2)),
    EngineFailed(message="weights need 353 GiB"),
    TokenEvent(request_id="r", token_id=5, logprobs=None, finish_reason=None, num_cached_tokens=0),
    TokenEvent(
        request_id="r",
        token_id=5,
        logprobs=TokenLogprobs(logprob=-0.1, top=((5, -0.1), (6, -3.25), (7, float("-inf")))),
        finish_reason="stop",
        num_cached_tokens=16,
    ),
    TokenEvent(
        request_id="r",
        token_id=5,
        logprobs=TokenLogprobs(logprob=-1.0, top=()),
        finish_reason="length",
        num_cached_tokens=0,
        queue_time=0.25,
    ),
    RequestAccepted(request_id="r"),
    PromptLogprobs(request_id="r", logprobs=(TokenLogprobs(logprob=-0.5, top=((5, -0.1),)),)),
    RequestRefused(request_id="r", message="the prompt is empty", parameter="prompt"),
    RequestRefused(request_id="r", message="too many wait", retry_after=2.5),
    RequestFailed(request_id="r", message="its time was over", kind="timeout"),
    StatsRecorder().snapshot(Gauges(1, 2, 3, 4, 5)),
]


@pytest.mark.parametrize(
    ("messages", "kind"), [(TO_ENGINE, ToEngine), (FROM_ENGINE, FromEngine)], ids=["to", "from"]
)
def test_round_trip(messages: list[object], kind: object) -> None:
    decoder: FrameDecoder[object] = FrameDecoder(kind)
    decoded = decoder.feed(encode_frame(messages))
    assert decoded == messages
    assert [type(message) for message in decoded] == [type(message) for message in messages]


def test_every_message_type_is_tried() -> None:
    assert {type(message) for message in TO_ENGINE} == set(ToEngine.__args__)
    assert {type(message) for message in FROM_ENGINE} == set(FromEngine.__args__)


@pytest.mark.parametrize("message", [SAMPLING, *TO_ENGINE, *FROM_ENGINE], ids=lambda m: type(m).__name__)
def test_messages_are_immutable(message: msgspec.Struct) -> None:
    with pytest.raises(AttributeError, match="immutable type"):
        setattr(message, message.__struct_fields__[0], None)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"type": "Abort"}, "missing required field `request_id`"),
        ({"type": "Abort", "request_id": 5}, "Expected `str`"),
        ({"type": "Nonsense"}, "Invalid value 'Nonsense'"),
        ({"request_id": "r"}, "missing required field `type`"),
        (
            {"type": "Request", "request_id": "r", "prompt_token_ids": [1.5], "sampling": {"max_tokens": 1}},
            "Expected `int`",
        ),
    ],
)
def test_malformed_messages_are_refused(message: dict[str, object], error: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=error):
        FrameDecoder[object](ToEngine).feed(encode_frame([message]))
