"""The HTTP API: its routes, and how requests come in and answers go out."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive

from nybble.engine.engine_client import EngineClient, ObservedEngine
from nybble.engine.errors import NybbleError
from nybble.server.access.access import Access
from nybble.server.access.key_gate import KeyGate, visit_of
from nybble.server.access.metered_engine import AskedPrompt, MeteredEngine, own_salt
from nybble.server.chat.chat_request import parse_chat_request, prepare_chat_request
from nybble.server.chat.completion import Completion
from nybble.server.chat.replay_store import ReplayStore
from nybble.server.errors import APIError, api_error
from nybble.server.event_stream import EventStream
from nybble.server.faults import AnswerFaults
from nybble.server.http_checks import CheckRequests
from nybble.server.http_metrics import CountRequests, HTTPMetrics
from nybble.server.incoming_body import read_body
from nybble.server.json_response import json_response
from nybble.server.monitoring import Monitoring
from nybble.server.openapi import describe_api
from nybble.server.request_ids import RequestIds
from nybble.server.requests.completion_request import parse_completion_request, prepare_completion_request
from nybble.server.requests.schemas import ChatCompletionRequest, Model, ModelList, Version
from nybble.server.requests.tokenize_request import detokenize, tokenize
from nybble.server.served_model import ServedModel
from nybble.server.server_config import ServerConfig
from nybble.server.text.text_completion import TextCompletionRun
from nybble.server.unknown_route import route_error
from nybble.server.work_pool import WorkPool

T = TypeVar("T")
_NUM_WORK_THREADS = 4
_WORK_SECONDS = 60.0


def create_app(
    engine: ObservedEngine, model: ServedModel, config: ServerConfig, access: Access | None = None
) -> Starlette:
    """The API over `engine`, which tests may script; open to all where `access` is None."""
    api = _API(engine, model, config)
    gate = [Middleware(KeyGate, access=access)] if access else []
    handled = (APIError, HTTPException, NybbleError)
    http = HTTPMetrics()
    routes = [
        Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/version", api.version),
        Route("/openapi.json", api.openapi),
        *Monitoring(engine, model.name, config.ready_timeout, http).routes(),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers=dict.fromkeys(handled, _answer_error) | {ClientDisconnect: _answer_nobody},
        middleware=[
            Middleware(CountRequests, metrics=http, routes=routes),
            Middleware(RequestIds),
            Middleware(AnswerFaults, answer=_answer_error),
            Middleware(CheckRequests),
            *gate,
        ],
    )
    app.router.redirect_slashes = False  # to an address that a Host header makes up
    return app


class _API:
    def __init__(self, engine: EngineClient, model: ServedModel, config: ServerConfig) -> None:
        self._engine = engine
        self._model = model
        self._config = config
        self._description = describe_api()
        self._pool = WorkPool(_NUM_WORK_THREADS, _WORK_SECONDS)
        self._replay = ReplayStore(model.tokenizer, config.max_replay_tokens)

    async def chat_completions(self, request: Request) -> Response:
        body = await read_body(request, self._config)
        # Templates and tokenizers take long on long prompts: not on the event loop.
        prepared = await self._pool.run(
            lambda: prepare_chat_request(_own(parse_chat_request(body), request), self._model, self._replay)
        )
        sampling = prepared.sampling
        prompt = AskedPrompt(prepared.prompt_token_ids, prepared.num_choices, sampling.max_tokens)
        engine = self._engine_for(request, [prompt])
        completion = Completion(prepared, engine, self._model, self._config.prices, self._replay)
        return await _run(request, completion, prepared.is_stream)

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, self._config)
        job = await self._pool.run(
            lambda: prepare_completion_request(parse_completion_request(body), self._model)
        )
        prompts = [
            AskedPrompt(one.token_ids, job.num_choices, one.sampling.max_tokens) for one in job.prompts
        ]
        engine = self._engine_for(request, prompts)
        completion = TextCompletionRun(job, engine, self._model, self._config.prices)
        return await _run(request, completion, job.is_stream)

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, self._config)
        return json_response(await self._pool.run(lambda: tokenize(body, self._model)))

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, self._config)
        return json_response(await self._pool.run(lambda: detokenize(body, self._model)))

    def _engine_for(self, request: Request, prompts: Sequence[AskedPrompt]) -> EngineClient:
        """The engine, charged to whose request it is. Raises TooManyRequestsError: its limits do not do."""
        visit = visit_of(request)
        if visit is None:
            return self._engine
        return MeteredEngine(self._engine, visit, prompts, self._model.max_model_len)

    async def models(self, request: Request) -> Response:
        return json_response(ModelList(data=[self._model_object()]))

    async def model(self, request: Request) -> Response:
        self._model.check_name(request.path_params["name"])
        return json_response(self._model_object())

    async def version(self, request: Request) -> Response:
        return json_response(Version(version("nybble")))

    async def openapi(self, request: Request) -> Response:
        return json_response(self._description)

    def _model_object(self) -> Model:
        model = self._model
        return Model(id=model.name, created=model.created, max_model_len=model.max_model_len)


def _own(asked: ChatCompletionRequest, request: Request) -> ChatCompletionRequest:
    """With a salt of the key's own, under which answers are remembered: keys share none."""
    visit = visit_of(request)
    salt = asked.cache_salt or ""
    return msgspec.structs.replace(asked, cache_salt=own_salt(visit.name, salt)) if visit else asked


async def _run(request: Request, completion: Completion | TextCompletionRun, is_stream: bool) -> Response:
    if not is_stream:
        return json_response(await _unless_disconnected(request, completion.whole()))
    stream = EventStream(completion.chunks())
    await _unless_disconnected(request, stream.begin(completion.accepted))
    return stream


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it when the client goes away (ClientDisconnect)."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for pending in (task, watcher):
            pending.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await pending


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer_error(request: Request, error: Exception) -> Response:
    answer = route_error(request, error) if isinstance(error, HTTPException) else api_error(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return json_response(answer.body(), answer.status, headers | answer.headers())


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's code for a client that is gone; nobody reads it
