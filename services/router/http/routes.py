"""The paths of the HTTP door and what answers them."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from services.router.fleet import Fleet
from services.router.http import page, requests
from services.router.http.answering import (
    Answering,
    ClientGoneError,
    Completions,
    internal,
    read_body,
    require_json,
)
from services.router.http.errors import Problem, problem, problem_of
from services.router.http.guard import key_of
from services.router.http.requests import Question, Source, decode
from services.router.http.responses import ChatTelling, CompletionTelling
from services.router.http.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from services.router.limits import invalid
from services.router.model import ServedModel
from services.router.peers import Peers
from services.router.prepare import encode, rendered
from services.router.request import TextPrompt
from shared import __version__
from shared.net.http import text_of
from shared.outcome import RefusedError
from shared.telemetry.exposition import Exposition

MAX_DETOKENIZED = 2**20
"""Token ids in one call of /detokenize."""

Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")
R = TypeVar("R")


class Api:
    """What answers. One object serves all calls."""

    def __init__(
        self,
        *,
        model: ServedModel,
        fleet: Fleet,
        answering: Answering,
        tokenizing: Executor,
        exposition: Exposition,
        peers: Peers,
        healthy: Callable[[], bool],
    ) -> None:
        self._model = model
        self._fleet = fleet
        self._answering = answering
        self._tokenizing = tokenizing
        self._healthy = healthy
        self._created = int(time.time())
        self._exposition = exposition
        self._peers = peers

    def application(self) -> Starlette:
        """The ASGI application."""
        tokenizer = self._model.tokenizer
        completions = Completions(
            self._answering, CompletionRequest, self._completion, lambda one: CompletionTelling(one, tokenizer)
        )
        chats = Completions(self._answering, ChatRequest, self._chat, lambda one: ChatTelling(one, tokenizer))
        routes = [
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chats, methods=["POST"]),
            Route("/v1/models", _guarded(self.models), methods=["GET"]),
            Route("/v1/models/{name:path}", _guarded(self.one_model), methods=["GET"]),
            Route("/tokenize", _guarded(self.tokenize), methods=["POST"]),
            Route("/detokenize", _guarded(self.detokenize), methods=["POST"]),
            Route("/health", _guarded(self.health), methods=["GET"]),
            Route("/version", _guarded(self.version), methods=["GET"]),
            Route("/metrics", _guarded(self.metrics), methods=["GET"]),
            *page.routes(self._model, self._fleet, self._answering.admission, self._peers),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_route})

    @property
    def _max_model_len(self) -> int:
        return self._fleet.max_model_len or self._model.max_model_len

    def _completion(self, request: CompletionRequest, source: Source) -> Question:
        return requests.completion(request, self._model, self._max_model_len, source)

    def _chat(self, request: ChatRequest, source: Source) -> Question:
        return requests.chat(request, self._model, source)

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._card(name) for name in self._model.names]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._model.check_name(name)
        return _json(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "sluice",
            "root": self._model.names[0],
            "parent": None,
            "max_model_len": self._max_model_len,
        }

    async def tokenize(self, request: Request) -> Response:
        asked = decode(await self._body(request), TokenizeRequest)
        prompt = requests.to_tokenize(asked, self._model)
        token_ids = await self._counted(request, self._token_ids, prompt)
        told: dict[str, Any] = {"count": len(token_ids), "max_model_len": self._max_model_len, "tokens": token_ids}
        if asked.return_token_strs:
            token_bytes = self._model.tokenizer.texts.token_bytes
            told["token_strs"] = [token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids]
        return _json(told)

    def _token_ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, TextPrompt):
            return encode(self._model, "prompt", prompt.text, self._longest, prompt.add_special_tokens)
        return encode(self._model, "chat", rendered(self._model, prompt), self._longest, False)

    @property
    def _longest(self) -> int:
        """Tokens that a call may bring: whether a model takes so many is for its caller to see."""
        return self._answering.max_request_bytes

    async def detokenize(self, request: Request) -> Response:
        asked = decode(await self._body(request), DetokenizeRequest)
        if asked.model:
            self._model.check_name(asked.model)
        if len(asked.tokens) > MAX_DETOKENIZED:
            raise invalid("tokens", f"{len(asked.tokens)} token ids; {MAX_DETOKENIZED} are allowed")
        self._model.limits.check_token_ids("tokens", asked.tokens)
        return _json({"prompt": await self._counted(request, self._text, asked.tokens)})

    def _text(self, token_ids: list[int]) -> str:
        return self._model.tokenizer.decode(token_ids, skip_special_tokens=False)

    async def _counted(self, request: Request, work: Callable[[T], R], given: T) -> R:
        """The work's result, on a thread, as one of the requests of the caller's key. Raises RefusedError."""
        with self._answering.admission.allowances.entered(key_of(request.scope)):
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work, given)

    async def _body(self, request: Request) -> bytes:
        require_json(request.scope)
        return await read_body(request.scope, request.receive, self._answering.max_request_bytes)

    async def health(self, request: Request) -> Response:
        """Healthy is: would answer a request now."""
        if self._healthy():
            return PlainTextResponse("ok\n")
        return PlainTextResponse("service unavailable\n", 503)

    async def version(self, request: Request) -> Response:
        return _json({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        """Of all processes of this router. On a thread: a scrape takes longer than a token may wait."""
        snapshots = await self._peers.snapshots()
        whole = await asyncio.to_thread(self._exposition.merged_with, snapshots) if snapshots else self._exposition
        content_type, body = await asyncio.to_thread(text_of, whole)
        return Response(body, headers={"content-type": content_type})


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _error(failure: Problem) -> Response:
    return Response(failure.body, failure.status, dict(failure.headers), "application/json")


def _guarded(endpoint: Endpoint) -> Endpoint:
    """The endpoint with its refusals and failures told in OpenAI's shape."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except RefusedError as error:
            return _error(problem_of(error.refusal))
        except ClientGoneError:
            return Response(status_code=499)
        except Exception as error:
            return _error(internal(request.scope, error))

    return answer


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405, which Starlette finds."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:256]}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    failure = problem(error.status_code, f"{where} is not served here", code=code)
    return _error(msgspec.structs.replace(failure, headers=list((error.headers or {}).items())))
