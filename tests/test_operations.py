"""What whoever runs a server sees of it: metrics, readiness, logs, its end. Each through a real process."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from processes import wait_until
from prometheus_client.parser import text_string_to_metric_families
from server_process import DEADLINE, ServerProcess, running_server
from tiny_glm import make_checkpoint, make_predictable
from tiny_tokenizer import write_tokenizer

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a draft layer, whose guesses are often right."""
    directory = tmp_path_factory.mktemp("tiny")
    make_checkpoint(directory, seed=3, num_mtp_layers=1, vocab_size=288, max_position_embeddings=4096)
    make_predictable(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = ("--num-speculative-tokens", "2", "--ready-timeout", "2", "--log-format", "json")
    with running_server(checkpoint, tmp_path_factory.mktemp("server"), *options) as server:
        yield server
        assert server.terminate() == 0


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=DEADLINE) as client:
        yield client


def body(max_tokens: int, text: str = "hello good world " * 20, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "max_tokens": max_tokens, "ignore_eos": True} | options


class Scrape:
    """What `/metrics` says: values by sample and labels but the model's, types by family."""

    def __init__(self, client: httpx.Client) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        self.types: dict[str, str] = {}
        for family in text_string_to_metric_families(client.get("/metrics").text):
            self.types[family.name] = family.type
            for sample in family.samples:
                labels = [value for name, value in sorted(sample.labels.items()) if name != "model_name"]
                self.values[sample.name, *labels] = sample.value

    def change(self, before: Scrape, *key: str) -> float:
        return self.values.get(key, 0.0) - before.values.get(key, 0.0)


COUNTERS = ("num_preemptions", "prompt_tokens", "generation_tokens", "prefix_cache_queries",
            "prefix_cache_hits", "request_success", "spec_decode_num_drafts", "spec_decode_num_draft_tokens",
            "spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos")  # fmt: skip
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
HISTOGRAMS = ("request_queue_time_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds",
              "e2e_request_latency_seconds", "request_prefill_time_seconds", "request_inference_time_seconds",
              "request_decode_time_seconds", "request_time_per_output_token_seconds", "request_prompt_tokens",
              "request_generation_tokens", "iteration_tokens_total")  # fmt: skip


def test_metrics_are_what_requests_did(client: httpx.Client) -> None:
    """Names and types of vLLM's, and values by what clients saw."""
    before = Scrape(client)
    start = time.monotonic()
    asked = [body(9), body(5, n=2), body(9), body(1)]
    answers = [client.post(CHAT, json=one) for one in asked]
    streamed = client.post(CHAT, json=body(7, stream=True, stream_options={"include_usage": True}))
    bad = client.post(CHAT, json=body(1, temperature="hot"))
    taken = time.monotonic() - start
    usages = [answer.json()["usage"] for answer in answers]
    usages.append(json.loads(streamed.text.split("data: ")[-2])["usage"])
    lengths = [9, 5, 5, 9, 1, 7]
    num_prompt = usages[0]["prompt_tokens"]
    wait_until(lambda: _ended(client, before) == len(lengths))
    now = Scrape(client)

    assert {name: now.types[f"vllm:{name}"] for name in COUNTERS} == dict.fromkeys(COUNTERS, "counter")
    assert {name: now.types[f"vllm:{name}"] for name in GAUGES} == dict.fromkeys(GAUGES, "gauge")
    assert {name: now.types[f"vllm:{name}"] for name in HISTOGRAMS} == dict.fromkeys(HISTOGRAMS, "histogram")
    assert [now.values[f"vllm:{name}",] for name in GAUGES] == [0, 0, 0]

    def change(*key: str) -> float:
        return now.change(before, *key)

    assert change("vllm:prompt_tokens_total") == change("vllm:prefix_cache_queries_total") == 6 * num_prompt
    assert change("vllm:generation_tokens_total") == sum(lengths)
    assert sum(usage["completion_tokens"] for usage in usages) == sum(lengths)
    assert change("vllm:num_preemptions_total") == 0
    assert change("vllm:request_success_total", "length") == 6
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    cached += (num_prompt - 1) // 16 * 16  # of the second choice, which no usage tells
    assert change("vllm:prefix_cache_hits_total") == cached > 0

    sums = {name: change(f"vllm:{name}_sum") for name in HISTOGRAMS}
    counts = {name: change(f"vllm:{name}_count") for name in HISTOGRAMS}
    assert (sums["request_prompt_tokens"], sums["request_generation_tokens"]) == (
        6 * num_prompt,
        sum(lengths),
    )
    assert counts.pop("iteration_tokens_total") == change("nybble:steps_total")
    assert counts.pop("inter_token_latency_seconds") == sum(lengths) - len(lengths)
    assert counts.pop("request_time_per_output_token_seconds") == 5  # one has a single token
    assert set(counts.values()) == {6}
    queued, prefill = sums["request_queue_time_seconds"], sums["request_prefill_time_seconds"]
    decode, inference = sums["request_decode_time_seconds"], sums["request_inference_time_seconds"]
    assert sums["time_to_first_token_seconds"] == pytest.approx(queued + prefill)
    assert inference == pytest.approx(prefill + decode)
    assert sums["e2e_request_latency_seconds"] == pytest.approx(queued + inference)
    assert 0 < decode == pytest.approx(sums["inter_token_latency_seconds"])
    assert sums["e2e_request_latency_seconds"] < 2 * taken  # two ran side by side

    drafts, accepted = (change(f"vllm:spec_decode_num_{name}_tokens_total") for name in ("draft", "accepted"))
    by_position = [change("vllm:spec_decode_num_accepted_tokens_per_pos_total", str(n)) for n in range(2)]
    assert 0 < change("vllm:spec_decode_num_drafts_total") <= drafts
    assert accepted == sum(by_position) <= drafts
    assert change("nybble:steps_total") + accepted >= sum(lengths) - 5  # a step of two gives two

    assert change("nybble:http_requests_total", "POST", CHAT, "200") == 5
    assert change("nybble:http_requests_total", "POST", CHAT, "400") == 1
    everything = [*answers, streamed, bad]
    sent = sum(len(answer.content) for answer in everything)
    received = sum(len(answer.request.content) for answer in everything)
    assert change("nybble:http_sent_bytes_total", "POST", CHAT) == sent
    assert change("nybble:http_received_bytes_total", "POST", CHAT) == received
    assert now.values["nybble:http_requests_in_flight", "POST", CHAT] == 0


def _ended(client: httpx.Client, before: Scrape) -> float:
    return Scrape(client).change(before, "vllm:e2e_request_latency_seconds_count")


def test_a_client_that_goes_is_counted_and_its_request_ended(client: httpx.Client) -> None:
    before = Scrape(client)
    with client.stream("POST", CHAT, json=body(3500, stream=True)) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # kept: its end would close the connection
        next(lines)
        wait_until(lambda: Scrape(client).values["nybble:http_requests_in_flight", "POST", CHAT] == 1)
    wait_until(lambda: Scrape(client).change(before, "vllm:request_success_total", "abort") == 1)
    now = Scrape(client)
    assert now.change(before, "vllm:generation_tokens_total") < 3500
    assert now.values["vllm:num_requests_running",] == 0
    assert now.values["nybble:http_requests_in_flight", "POST", CHAT] == 0


def test_an_engine_that_hangs_is_noticed_and_seen_to_come_back(
    server: ServerProcess, client: httpx.Client
) -> None:
    """Within `--ready-timeout` and an interval: 2 s and 0.2 s. It is alive, so health is another matter."""
    assert client.get("/ready").status_code == 200
    server.engine.send_signal(signal.SIGSTOP)
    try:
        stopped = time.monotonic()
        while client.get("/ready").status_code == 200:
            time.sleep(0.2)
        assert time.monotonic() - stopped < 2.2 + 1.0  # of a busy machine; twice the timeout would be 4
        assert client.get("/health").status_code == 200
    finally:
        server.engine.send_signal(signal.SIGCONT)
    wait_until(lambda: client.get("/ready").status_code == 200)


@pytest.fixture(scope="module")
def quick(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """No model, 500 tokens a second for each request; it gives clients 3 s."""
    options = ("--null-step-ms", "2", "--client-timeout", "3")
    with running_server(checkpoint, tmp_path_factory.mktemp("quick"), *options) as server:
        yield server


def send(connection: socket.socket, max_tokens: int) -> None:
    content = json.dumps(body(max_tokens, stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)


def seconds_of_answer(client: httpx.Client) -> float:
    start = time.monotonic()
    answer = client.post(CHAT, json=body(400, stream=True))
    assert answer.text.endswith("data: [DONE]\n\n")
    return time.monotonic() - start


def test_a_reader_that_takes_nothing_costs_only_itself(quick: ServerProcess) -> None:
    """Others are as fast as without it, memory does not grow, and it is cut off when its time is over."""
    with httpx.Client(base_url=quick.url, timeout=DEADLINE) as client, ExitStack() as readers:
        alone = [seconds_of_answer(client) for _ in range(3)]
        before, memory = Scrape(client), psutil.Process(quick.process.pid).memory_info().rss
        for _ in range(8):
            send(readers.enter_context(quick.connect(receive_buffer=4096)), 100_000)
        beside = [seconds_of_answer(client) for _ in range(3)]
        assert min(beside) < 2 * max(
            alone
        )  # of a busy machine; one that waits for the readers takes for ever
        wait_until(lambda: Scrape(client).change(before, "vllm:request_success_total", "abort") == 8)
        now = Scrape(client)
        assert now.values["nybble:http_requests_in_flight", "POST", CHAT] == 0
        assert now.values["vllm:num_requests_running",] == 0
        assert psutil.Process(quick.process.pid).memory_info().rss - memory < 64 << 20


def test_nothing_listens_but_the_address_that_was_asked_for(quick: ServerProcess) -> None:
    """Server and engine have no port between them."""
    server = psutil.Process(quick.process.pid)
    family = [server, *server.children(recursive=True)]
    assert len(family) > 1
    found = [
        one.laddr for process in family for one in process.net_connections("inet") if one.status == "LISTEN"
    ]
    assert found == [quick.address]


def test_a_client_that_sends_too_slowly_is_cut_off(quick: ServerProcess) -> None:
    """Its head: no answer. Its body: status 408. Others are not hindered."""
    with ExitStack() as clients:
        heads = [clients.enter_context(quick.connect()) for _ in range(50)]
        for one in heads:
            one.sendall(b"GET /v1/models HTTP/1.1\r\nX-a: ")
        bodies = [clients.enter_context(quick.connect()) for _ in range(50)]
        for one in bodies:
            one.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{".encode())
        start = time.monotonic()
        assert httpx.get(f"{quick.url}/health", timeout=DEADLINE).status_code == 200
        assert {one.recv(1 << 16) for one in heads} == {b""}
        for one in bodies:
            assert one.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
        assert 2 < time.monotonic() - start < 3 + 10


@pytest.fixture
def steady(checkpoint: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """No model, a step every 0.3 s, logs as JSON."""
    with running_server(checkpoint, tmp_path, "--null-step-ms", "300", "--log-format", "json") as server:
        yield server


def test_a_client_that_goes_costs_one_more_step(steady: ServerProcess) -> None:
    """And then SIGTERM: what is open is finished, nothing new begins, the log is JSON to its end."""
    with httpx.Client(base_url=steady.url, timeout=DEADLINE) as client:
        with client.stream("POST", CHAT, json=body(1000, stream=True)) as response:
            lines = (line for line in response.iter_lines() if line)
            first, *_ = (next(lines) for _ in range(5))  # the role, and four tokens
        assert '"role":"assistant"' in first
        wait_until(lambda: Scrape(client).values.get(("vllm:request_success_total", "abort")) == 1)
        # One is computed when the connection is closed; the abort comes before the step after it.
        assert 4 <= Scrape(client).values["vllm:generation_tokens_total",] <= 4 + 2

        with client.stream("POST", CHAT, json=body(10, stream=True)) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            steady.process.send_signal(signal.SIGTERM)
            wait_until(lambda: _refuses(steady))
            *_, last, done = lines
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
    assert steady.process.wait(DEADLINE) == 0
    records = [json.loads(line) for line in steady.log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message", "pid"} <= record.keys() for record in records)
    assert {record["pid"] for record in records} >= {steady.process.pid}
    assert records[-1]["message"] == "stopped" and {record["level"] for record in records} == {"INFO"}


def _refuses(server: ServerProcess) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(server.address) != 0


def test_a_second_sigterm_ends_at_once(steady: ServerProcess) -> None:
    asked = {"json": body(1000, stream=True), "timeout": DEADLINE}
    with httpx.stream("POST", steady.url + CHAT, **asked) as response:
        lines = response.iter_lines()
        next(lines)
        steady.process.send_signal(signal.SIGTERM)
        wait_until(lambda: _refuses(steady))
        steady.process.send_signal(signal.SIGTERM)
        with suppress(httpx.RemoteProtocolError):
            assert len(list(lines)) < 100
    assert steady.process.wait(20) == 0
    assert all(json.loads(line) for line in steady.log.read_text().splitlines())
