"""`GET /metrics`: what the engine counts, in Prometheus' text format.

Names are vLLM's where the meaning is the same, so that its dashboards work; others begin with `nybble:`. The
engine's counts begin anew when it is restarted, which Prometheus takes for what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from nybble.engine.engine_client import ObservedEngine
from nybble.engine.messages import EngineStats, HistogramCounts, SpeculationStats
from nybble.server.http_metrics import HTTPMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LABELS = ("model_name",)


class Metrics:
    """The metrics of one engine, of HTTP, and of the server's own process."""

    def __init__(self, engine: ObservedEngine, model_name: str, http: HTTPMetrics) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(http)
        self._registry.register(_EngineCollector(engine, model_name))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: ObservedEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are known without asking an engine that may not have spoken yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        name = self._model_name
        yield _gauge("nybble:engine_up", "1 while the engine runs.", name, float(self._engine.is_alive))
        stats = self._engine.stats
        if stats is not None:
            yield from _gauges(stats, name)
            yield from _counters(stats, name)
            yield from _histograms(stats, name)
            if stats.speculation is not None:
                yield from _speculation(stats.speculation, name)


def _gauges(stats: EngineStats, name: str) -> Iterator[Metric]:
    used = 1 - stats.num_free_blocks / max(stats.num_blocks, 1)
    yield _gauge("vllm:num_requests_running", "Requests that run.", name, stats.num_running)
    yield _gauge("vllm:num_requests_waiting", "Requests that wait to be run.", name, stats.num_waiting)
    yield _gauge("vllm:kv_cache_usage_perc", "Used part of the KV cache; 1 is all of it.", name, used)


def _counters(stats: EngineStats, name: str) -> Iterator[Metric]:
    for metric, text, value in (
        ("vllm:num_preemptions", "Sequences that lost their KV cache to others.", stats.num_preemptions),
        ("vllm:prompt_tokens", "Tokens of prompts, cached ones included.", stats.num_prompt_tokens),
        ("vllm:generation_tokens", "Tokens of answers.", stats.num_generated_tokens),
        (
            "vllm:prefix_cache_queries",
            "Tokens looked up in the prefix cache.",
            stats.num_prompt_tokens,
        ),
        ("vllm:prefix_cache_hits", "Of those, the ones found in the prefix cache.", stats.num_cached_tokens),
        ("nybble:steps", "Steps of the engine.", stats.num_steps),
    ):
        yield _counter(metric, text, name, value)
    ends = CounterMetricFamily(
        "vllm:request_success",
        "Requests that ended, by reason; abort: also at a stop string.",
        labels=(*_LABELS, "finished_reason"),
    )
    for reason, count in sorted(stats.num_finished.items()):
        ends.add_metric((name, reason), count)
    yield ends


def _histograms(stats: EngineStats, name: str) -> Iterator[Metric]:
    for metric, text, counts in (
        ("vllm:request_queue_time_seconds", "From arrival to the first step.", stats.queue_time),
        ("vllm:time_to_first_token_seconds", "From arrival to the first token.", stats.time_to_first_token),
        ("vllm:inter_token_latency_seconds", "From a token to the next.", stats.inter_token_latency),
        ("vllm:e2e_request_latency_seconds", "From arrival to the last token.", stats.request_time),
        (
            "vllm:request_prefill_time_seconds",
            "From the first step to the first token.",
            stats.prefill_time,
        ),
        (
            "vllm:request_inference_time_seconds",
            "From the first step to the last token.",
            stats.inference_time,
        ),
        ("vllm:request_decode_time_seconds", "From the first token to the last.", stats.decode_time),
        (
            "vllm:request_time_per_output_token_seconds",
            "That, for each token after the first.",
            stats.time_per_output_token,
        ),
        ("vllm:request_prompt_tokens", "Tokens of a request's prompt.", stats.prompt_tokens),
        ("vllm:request_generation_tokens", "Tokens of a request's answer.", stats.output_tokens),
        ("vllm:iteration_tokens_total", "Tokens that a step computes.", stats.step_tokens),
        ("nybble:step_time_seconds", "From a step's launch to its tokens.", stats.step_time),
        ("nybble:step_sequences", "Sequences in a step.", stats.step_sequences),
    ):
        yield _histogram(metric, text, name, counts)


def _speculation(stats: SpeculationStats, name: str) -> Iterator[Metric]:
    drafts, accepted = sum(stats.num_drafts), sum(stats.num_accepted)
    yield _counter(
        "vllm:spec_decode_num_drafts", "Times a sequence was drafted for.", name, stats.num_drafts[0]
    )
    yield _counter("vllm:spec_decode_num_draft_tokens", "Tokens that were drafted.", name, drafts)
    yield _counter("vllm:spec_decode_num_accepted_tokens", "Drafts that stayed.", name, accepted)
    yield _by_position("vllm:spec_decode_num_accepted_tokens_per_pos", stats.num_accepted, name)
    yield _by_position("nybble:spec_decode_num_draft_tokens_per_pos", stats.num_drafts, name)


def _by_position(metric: str, counts: Sequence[int], name: str) -> Metric:
    family = CounterMetricFamily(metric, "The same by the draft's position.", labels=(*_LABELS, "position"))
    for position, count in enumerate(counts):
        family.add_metric((name, str(position)), count)
    return family


def _gauge(metric: str, text: str, name: str, value: float) -> Metric:
    family = GaugeMetricFamily(metric, text, labels=_LABELS)
    family.add_metric((name,), value)
    return family


def _counter(metric: str, text: str, name: str, value: int) -> Metric:
    family = CounterMetricFamily(metric, text, labels=_LABELS)
    family.add_metric((name,), value)
    return family


def _histogram(metric: str, text: str, name: str, counts: HistogramCounts) -> Metric:
    bounds = [f"{bound:g}" for bound in counts.bounds] + ["+Inf"]
    buckets = [*zip(bounds, map(float, counts.cumulative), strict=True)]
    family = HistogramMetricFamily(metric, text, labels=_LABELS)
    family.add_metric((name,), buckets, counts.sum)
    return family
