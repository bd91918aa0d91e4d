"""A real server process over the demo model, driven by the official client and by raw HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import psutil
import pytest
from openai.types.chat import ChatCompletionMessageParam
from processes import Family, family, wait_until
from server_process import DEADLINE, NYBBLE, start_server, wait_until_listening
from tiny_glm import make_checkpoint
from tiny_tokenizer import write_tokenizer
from tls_certificate import write_certificate

TORCHRUN = Path(sys.executable).with_name("torchrun")
MODEL = "demo-checkpoint"
FRANCE: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Server:
    url: str
    process: psutil.Process

    @property
    def engine(self) -> psutil.Process:
        """Beside which there may be the process that checks grammars."""
        name = "nybble.engine.engine_process"
        (child,) = (child for child in self.process.children() if name in child.cmdline())
        return child


@pytest.fixture(scope="module")
def server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    process, log = start_server(demo_checkpoint, tmp_path_factory.mktemp("server"))
    try:
        yield Server(wait_until_listening(log, process), psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, question: str, **options: Any) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        **({"temperature": 0, "max_tokens": 40} | options),
    )


def stream_text(client: openai.OpenAI, question: str, **options: Any) -> tuple[str, str | None]:
    text, reason = "", None
    chunks = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        stream=True,
        **({"temperature": 0, "max_tokens": 40} | options),
    )
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason


def content(completion: openai.types.chat.ChatCompletion) -> str:
    text = completion.choices[0].message.content
    assert text is not None
    return text


def test_names_paris(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)
    assert "Paris" in content(completion)
    assert completion.choices[0].finish_reason == "stop"


CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "maximum": 99},
    },
    "required": ["city", "population"],
    "additionalProperties": False,
}


def test_an_answer_by_a_schema(client: openai.OpenAI) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    completion = ask(client, "The capital of France, as JSON?", max_tokens=200, response_format=asked)
    answer = json.loads(content(completion))
    jsonschema.validate(answer, CITY)
    assert completion.choices[0].finish_reason == "stop"


def test_answers_that_are_json_objects(client: openai.OpenAI) -> None:
    """Streamed and not, several at once."""
    options: dict[str, Any] = {"response_format": {"type": "json_object"}, "max_tokens": 60}
    completion = ask(client, "Name a colour as JSON.", n=2, **options)
    texts = [(choice.message.content or "", choice.finish_reason) for choice in completion.choices]
    for answer, finish_reason in [*texts, stream_text(client, "Name a colour as JSON.", **options)]:
        assert answer.lstrip().startswith("{")
        assert finish_reason == "length" or isinstance(json.loads(answer), dict)


@pytest.mark.parametrize(
    ("field", "asked", "pattern"),
    [
        ("guided_regex", "[a-f]{3}-[0-9]{2}", "[a-f]{3}-[0-9]{2}"),
        ("guided_choice", ["red", "dark blue", 'a "quoted" one'], 'red|dark blue|a "quoted" one'),
        ("guided_grammar", 'start: "a" ("b" | "c")~2', "a[bc]{2}"),
        ("guided_grammar", 'root ::= "x" [0-9] "y"?', "x[0-9]y?"),
        ("structured_outputs", {"regex": "no|yes"}, "no|yes"),
        ("structured_outputs", {"json": {"const": [1, 2]}}, r"\s*\[\s*1\s*,\s*2\s*\]\s*"),
    ],
)
def test_answers_of_vllms_forms(client: openai.OpenAI, field: str, asked: object, pattern: str) -> None:
    completion = ask(client, "Say something.", extra_body={field: asked})
    assert re.fullmatch(pattern, content(completion)), content(completion)
    assert completion.choices[0].finish_reason == "stop"


def test_completions_of_a_form(client: openai.OpenAI) -> None:
    asked = {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}}
    completion = client.completions.create(
        model=MODEL, prompt=["A city as JSON: ", "Another one: "], max_tokens=200, extra_body=asked
    )
    for choice in completion.choices:
        jsonschema.validate(json.loads(choice.text), CITY)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", extra_body={"guided_regex": "("})
    assert caught.value.param == "guided_regex"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "(unclosed"}, "guided_regex"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "x"}},
                }
            },
            "response_format.json_schema.schema",
        ),
        ({"guided_regex": "a" * 300_000}, "guided_regex"),
    ],
)
def test_a_bad_grammar_disturbs_nobody(client: openai.OpenAI, fields: dict[str, object], param: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(ask, client, "Count to ten.", max_tokens=10)
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, "Say something.", extra_body=fields)
        assert caught.value.param == param
        assert len(content(good.result())) > 0
    assert ask(client, "Say yes.", extra_body={"guided_choice": ["yes"]}).choices[0].message.content == "yes"


def test_lists_the_model(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL


QUESTIONS = [
    ("Count from one to ten.", {}),
    ("Name three colours.", {"temperature": 1.0, "seed": 5, "top_p": 0.9}),
    ("Say hello in Chinese, Japanese, Russian and Greek.", {"max_tokens": 80}),
    ("Write five emoji.", {"temperature": 1.5, "seed": 3, "max_tokens": 80}),
]


@pytest.mark.parametrize(("question", "options"), QUESTIONS)
def test_stream_equals_not_streamed(client: openai.OpenAI, question: str, options: dict[str, Any]) -> None:
    whole = ask(client, question, **options)
    assert stream_text(client, question, **options) == (content(whole), whole.choices[0].finish_reason)


def test_characters_of_several_bytes_arrive_whole(client: openai.OpenAI) -> None:
    """The model copies text whose characters take up to three tokens each."""
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "Repeat: 😀😃😄 你好世界"},
        {"role": "assistant", "content": "😀😃😄 你好世界"},
        {"role": "user", "content": "Repeat: 你好世界 😀😃😄"},
    ]
    chunks = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, stream=True)
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "😀😃😄 你好世界" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_stop_string_across_token_borders(client: openai.OpenAI) -> None:
    question = "Count from one to ten in digits, separated by commas."
    full = content(ask(client, question, max_tokens=24))
    for start in range(4, 20, 3):
        stop = full[start : start + 4]
        expected = full[: full.find(stop)]
        completion = ask(client, question, max_tokens=24, stop=[stop, "never appears"])
        assert content(completion) == expected
        assert completion.choices[0].finish_reason == "stop"
        assert stream_text(client, question, max_tokens=24, stop=stop) == (expected, "stop")


def test_usage_cache_and_cost(client: openai.OpenAI) -> None:
    question = "How do I use the prefix cache? " * 20
    first, second = (ask(client, question, max_tokens=5).usage for _ in range(2))
    assert first is not None and second is not None
    assert first.completion_tokens == 5
    assert first.total_tokens == first.prompt_tokens + 5
    assert first.prompt_tokens_details is not None and second.prompt_tokens_details is not None
    assert first.prompt_tokens_details.cached_tokens == 0
    cached = second.prompt_tokens_details.cached_tokens
    assert cached == (second.prompt_tokens - 1) // 16 * 16
    assert second.model_extra is not None
    price = (second.prompt_tokens - cached) * 0.43 + cached * 0.08 + 5 * 1.75
    assert second.model_extra["estimated_cost"] == pytest.approx(price / 1e6)


def test_streamed_usage_comes_last_and_only_if_asked_for(client: openai.OpenAI) -> None:
    def chunks(**options: Any) -> list[Any]:
        return list(
            client.chat.completions.create(
                model=MODEL, messages=FRANCE, max_tokens=4, temperature=0, stream=True, **options
            )
        )

    *others, last = chunks(stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in others)
    assert all(chunk.usage is None for chunk in chunks())


def test_logprobs(client: openai.OpenAI) -> None:
    logprobs = ask(client, "Hello!", logprobs=True, top_logprobs=3, max_tokens=6).choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)  # greedy
        assert entry.logprob <= 0


def test_32_chats_at_once(client: openai.OpenAI) -> None:
    """Each gets the answer it gets alone."""
    questions = [f"What is {n} + {n + 1}?" for n in range(32)]
    alone = [content(ask(client, question, max_tokens=16)) for question in questions[:6]]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda q: stream_text(client, q, max_tokens=16)[0], questions))
    assert together[:6] == alone
    assert all(together)


def test_raw_stream_ends_in_done(server: Server) -> None:
    body = {"model": MODEL, "messages": FRANCE, "stream": True, "max_tokens": 3}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=DEADLINE) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"


@pytest.mark.parametrize("is_stream", [True, False])
def test_closed_connection_aborts(server: Server, client: openai.OpenAI, is_stream: bool) -> None:
    """4,000 tokens would keep the engine busy for minutes; it must fall idle at once instead."""
    question = {"role": "user", "content": "Tell me a very long story."}
    body = {"model": MODEL, "messages": [question], "stream": is_stream, "max_tokens": 4000}
    # A temperature of 2 never ends its turn by itself.
    payload = json.dumps(body | {"temperature": 2.0, "seed": 4}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(payload)}\r\n\r\n"
        connection.sendall(head.encode() + payload)
        _wait_until(lambda: _cpu_over(server.engine, 0.3) > 0.05)
    _wait_until(lambda: _cpu_over(server.engine, 0.3) == 0.0)


def _cpu_over(process: psutil.Process, seconds: float) -> float:
    """CPU seconds that a process uses in the next `seconds`."""
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    return (after.user + after.system) - (before.user + before.system)


def _wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("options", "error", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x " * 20_000}]}, openai.BadRequestError, "messages"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools[0].function"),
    ],
)
def test_bad_requests_through_the_client(
    client: openai.OpenAI, options: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**({"model": MODEL, "messages": FRANCE} | options))
    assert caught.value.body["param"] == param  # type: ignore[index]


def test_too_large_a_body(server: Server) -> None:
    response = httpx.post(f"{server.url}/v1/chat/completions", content=b" " * (17 << 20))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_terminated_it_answers_what_is_open(demo_checkpoint: Path, tmp_path: Path) -> None:
    """An answer that outlasts the timeout ends in an error event; the server in exit code 0."""
    process, log = start_server(demo_checkpoint, tmp_path, "--shutdown-timeout", "1")
    body = {"model": MODEL, "messages": FRANCE, "stream": True, "temperature": 2.0, "seed": 4}
    url = f"{wait_until_listening(log, process)}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=DEADLINE) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        *_, error, done = (line for line in lines if line)
    assert "engine stopped" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert done == "data: [DONE]"
    assert process.wait(DEADLINE) == 0
    assert "Traceback" not in log.read_text()


def test_terminated_it_does_not_wait_for_half_a_request(demo_checkpoint: Path, tmp_path: Path) -> None:
    process, log = start_server(demo_checkpoint, tmp_path, "--shutdown-timeout", "1")
    host, port = wait_until_listening(log, process).removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 500\r\n\r\nhalf"
        connection.sendall(head.encode())
        httpx.get(f"http://{host}:{port}/health")  # answered after the head above was read
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_client_that_offers_http2_keeps_its_body(server: Server) -> None:
    """As Java's HttpClient asks on every plain connection."""
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAA"}
    body = {"model": MODEL, "messages": FRANCE, "max_tokens": 1}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=DEADLINE)
    assert response.status_code == 200


def test_endless_headers_are_refused(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: " + b"x" * (1 << 20))
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_survives_the_engine(server: Server, client: openai.OpenAI) -> None:
    """Killed in the middle of an answer: that answer ends in an error, health says so, service returns."""
    chunks = client.chat.completions.create(
        model=MODEL, messages=FRANCE, max_tokens=2000, temperature=2.0, seed=4, stream=True
    )
    next(iter(chunks))
    os.kill(server.engine.pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine stopped"):
        list(chunks)
    deadline = time.monotonic() + DEADLINE
    while (health := httpx.get(f"{server.url}/health")).status_code != 200:
        assert health.status_code == 503 and "error" in health.json()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "Paris" in content(client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_checkpoint(directory, seed=3, vocab_size=288, max_position_embeddings=4096)
    write_tokenizer(directory)
    return directory


@contextmanager
def several_ranks(
    commands: Sequence[Sequence[str | Path]], directory: Path
) -> Iterator[tuple[Family, list[subprocess.Popen[bytes]], str]]:
    """What was started, the processes of the commands, and where the first one serves."""
    with family() as processes:
        environment = processes.environment | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        started, logs = [], []
        for number, command in enumerate(commands):
            logs.append(directory / f"log-{number}")
            with logs[-1].open("w") as output:
                started.append(subprocess.Popen(command, stderr=output, env=environment))
        try:
            yield processes, started, wait_until_listening(logs[0], started[0])
        finally:
            processes.kill()
            for process in started:
                process.wait()


def serve_tiny(tiny: Path, *options: str) -> list[str | Path]:
    """On the reference: ranks of native code, which quantize their own shares, need not agree with one."""
    common = ["--backend", "reference", "--served-model-name", "tiny"]
    return [NYBBLE, "serve", tiny, "--port", "0", *common, *options]


@contextmanager
def two_nodes(tiny: Path, directory: Path) -> Iterator[tuple[Family, list[subprocess.Popen[bytes]], str]]:
    """Two ranks, each as on a machine of its own."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    here = ["--master-addr", "127.0.0.1", "--master-port", str(port), "--no-python"]
    served = serve_tiny(tiny, "--tensor-parallel-size", "2")
    commands = [
        [TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node), *here, *served]
        for node in range(2)
    ]
    with several_ranks(commands, directory) as started:
        yield started


def tiny_body(max_tokens: int, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello good world"}]
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": max_tokens} | options


def answer_of(url: str) -> list[list[int]]:
    """The bytes of every token of an answer."""
    body = tiny_body(24, logprobs=True)
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=DEADLINE)
    return [entry["bytes"] for entry in response.json()["choices"][0]["logprobs"]["content"]]


@pytest.fixture(scope="module")
def answer(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What one rank answers."""
    with several_ranks([serve_tiny(tiny)], tmp_path_factory.mktemp("alone")) as (_, _, url):
        return answer_of(url)


def test_two_ranks_answer_as_one(tiny: Path, answer: list[list[int]], tmp_path: Path) -> None:
    command = serve_tiny(tiny, "--tensor-parallel-size", "2")
    with several_ranks([command], tmp_path) as (processes, (server,), url):
        assert answer_of(url) == answer
        assert len(answer) == 24
        server.send_signal(signal.SIGTERM)
        assert server.wait(DEADLINE) == 0
        assert processes.is_gone()


def test_two_nodes_answer_as_one_and_end_in_order(
    tiny: Path, answer: list[list[int]], tmp_path: Path
) -> None:
    """An answer that is under way when the first node is terminated is finished."""
    with two_nodes(tiny, tmp_path) as (processes, agents, url):
        assert answer_of(url) == answer
        body = tiny_body(200, stream=True, seed=1, temperature=1)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=DEADLINE) as response:
            lines = response.iter_lines()
            next(lines)
            agents[0].send_signal(signal.SIGTERM)
            *_, last, done = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
        wait_until(processes.is_gone, DEADLINE)


def test_two_nodes_end_with_a_killed_rank(tiny: Path, tmp_path: Path) -> None:
    """Of the node that does not serve: the open answer ends in an error, and nothing is left."""
    with two_nodes(tiny, tmp_path) as (processes, agents, url):
        body = tiny_body(4000, stream=True)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=DEADLINE) as response:
            lines = response.iter_lines()
            next(lines)
            processes.rank(1, "serve").kill()
            killed = time.monotonic()
            *_, error, done = (line for line in lines if line)
        assert time.monotonic() - killed < 5
        assert "engine stopped" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert done == "data: [DONE]"
        assert 0 not in [agent.wait(DEADLINE) for agent in agents]
        wait_until(processes.is_gone, DEADLINE)


@pytest.mark.parametrize("node", [0, 1])
def test_two_nodes_end_with_a_killed_agent(node: int, tiny: Path, tmp_path: Path) -> None:
    with two_nodes(tiny, tmp_path) as (processes, agents, _):
        agents[node].kill()
        wait_until(processes.is_gone, DEADLINE)


def test_keys_and_tls_from_the_command_to_the_answer(tiny: Path, tmp_path: Path) -> None:
    """On all addresses; what a key has used is remembered by the next server, though the first is killed."""
    keys, (certificate, private) = tmp_path / "keys.toml", write_certificate(tmp_path)
    made: list[str | Path] = [NYBBLE, "key", "ann", "--file", keys, "--tokens-per-day", "100"]
    key = subprocess.run(made, capture_output=True, text=True, check=True, timeout=DEADLINE).stdout.strip()
    options = ["--host", "0.0.0.0", "--api-key-file", str(keys), "--served-model-name", "tiny"]
    options += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(private)]
    trusted, headers = ssl.create_default_context(cafile=certificate), {"Authorization": f"Bearer {key}"}

    def statuses(*lengths: int) -> list[int]:
        """Of requests for answers of at most so many tokens, from a server that is then killed."""
        process, log = start_server(tiny, tmp_path, *options)
        url = wait_until_listening(log, process).replace("0.0.0.0", "127.0.0.1")
        assert url.startswith("https://")
        with httpx.Client(verify=trusted, base_url=url, timeout=DEADLINE, headers=headers) as client:
            asked = [tiny_body(length, ignore_eos=True) for length in lengths]
            answers = [client.post("/v1/chat/completions", json=body) for body in asked]
            assert client.get("/health", headers={"Authorization": ""}).status_code == 200
            assert client.get("/v1/models", headers={"Authorization": ""}).status_code == 401
        process.kill()
        process.wait(DEADLINE)
        assert "Traceback" not in log.read_text() and key not in log.read_text()
        return [answer.status_code for answer in answers]

    assert statuses(2) == [200]
    num_prompt = json.loads((tmp_path / "keys.toml.usage.jsonl").read_text())["prompt_tokens"]
    rest = 100 - (num_prompt + 2) - num_prompt
    assert statuses(rest + 1, rest, 1) == [429, 200, 429]
