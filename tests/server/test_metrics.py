from __future__ import annotations

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import ScriptedEngine

from nybble.engine.engine_stats import Gauges, StatsRecorder
from nybble.engine.messages import EngineStats, HistogramCounts, SpeculationStats
from nybble.server.http_metrics import HTTPMetrics
from nybble.server.metrics import Metrics


def samples(engine: ScriptedEngine) -> dict[tuple[str, str], float]:
    """By name and the label beside the model's, read by the library's own parser."""
    found = {}
    for family in text_string_to_metric_families(Metrics(engine, 'a "b"\n', HTTPMetrics()).text().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if not sample.name.startswith("process_"):
                assert labels.pop("model_name") == 'a "b"\n'
            found[sample.name, "".join(labels.values())] = sample.value
    return found


def stats() -> EngineStats:
    gauges = Gauges(num_waiting=3, num_running=2, num_blocks=10, num_free_blocks=4, num_preemptions=7)
    counts = HistogramCounts(bounds=(0.1, 1.0), cumulative=(2, 5, 6), sum=4.5)
    return msgspec.structs.replace(
        StatsRecorder().snapshot(gauges),
        num_prompt_tokens=100,
        num_cached_tokens=40,
        num_generated_tokens=50,
        num_finished={"stop": 4, "abort": 1},
        time_to_first_token=counts,
        speculation=SpeculationStats(num_drafts=(9, 8), num_accepted=(7, 5), depth=2),
    )


def test_what_the_engine_counts() -> None:
    engine = ScriptedEngine([])
    engine.stats = stats()
    found = samples(engine)
    expected = {
        ("nybble:engine_up", ""): 1,
        ("vllm:num_requests_waiting", ""): 3,
        ("vllm:num_requests_running", ""): 2,
        ("vllm:kv_cache_usage_perc", ""): pytest.approx(0.6),
        ("vllm:num_preemptions_total", ""): 7,
        ("vllm:prompt_tokens_total", ""): 100,
        ("vllm:prefix_cache_queries_total", ""): 100,
        ("vllm:prefix_cache_hits_total", ""): 40,
        ("vllm:generation_tokens_total", ""): 50,
        ("vllm:request_success_total", "stop"): 4,
        ("vllm:request_success_total", "abort"): 1,
        ("vllm:time_to_first_token_seconds_bucket", "0.1"): 2,
        ("vllm:time_to_first_token_seconds_bucket", "1"): 5,
        ("vllm:time_to_first_token_seconds_bucket", "+Inf"): 6,
        ("vllm:time_to_first_token_seconds_count", ""): 6,
        ("vllm:time_to_first_token_seconds_sum", ""): 4.5,
        ("vllm:iteration_tokens_total_count", ""): 0,
        ("vllm:spec_decode_num_draft_tokens_total", ""): 17,
        ("vllm:spec_decode_num_accepted_tokens_total", ""): 12,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "1"): 5,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["process_resident_memory_bytes", ""] > 0


def test_before_the_engine_has_said_anything() -> None:
    found = samples(ScriptedEngine([], is_alive=False))
    assert {key: value for key, value in found.items() if not key[0].startswith("process_")} == {
        ("nybble:engine_up", ""): 0
    }
