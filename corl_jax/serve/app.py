"""The routes of the server: reads bodies, waits for samples, answers in OpenAI's JSON."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from corl_jax.data.questions import replace_surrogates
from corl_jax.serve import responses
from corl_jax.serve.batcher import Batcher, Closed, QueueFull
from corl_jax.serve.engine import Engine, Job
from corl_jax.serve.requests import ApiError, check_model, read_chat, read_image_request

MAX_BODY_BYTES = 2**25  # an image of 25 MB in base64
BODY_S = 120.0  # longest wait for a body
READERS = 4  # threads that decode and encode images
MAX_MESSAGE = 2000  # characters of an error
CLOSED_REQUEST = 499  # the client has gone; nobody reads the answer

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Handler = Callable[[Request], Awaitable[Response]]


class Server:
    """The handlers, and what they share."""

    def __init__(
        self, engine: Engine, batcher: Batcher, name: str, api_key: str | None, max_requests: int
    ):
        self.engine, self.batcher, self.name = engine, batcher, name
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._max_requests, self._active = max_requests, 0
        self._readers = ThreadPoolExecutor(READERS, "reader")
        self._started = int(time.time())

    def make_app(self) -> Starlette:
        """Returns the application."""
        routes = [
            Route("/health", self.tell_health),
            Route("/v1/models", self._protect(self.list_models)),
            Route("/v1/models/{name:path}", self._protect(self.describe_model)),
            Route("/v1/chat/completions", self._protect(self.answer), methods=["POST"]),
            Route("/v1/images/generations", self._protect(self.draw), methods=["POST"]),
        ]
        handlers: Any = {
            ApiError: _answer_error, HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody, Exception: _answer_unexpected_error,
        }  # fmt: skip
        return Starlette(routes=routes, exception_handlers=handlers)

    # ---- routes

    async def tell_health(self, request: Request) -> Response:
        """Answers with status 200 while samples can be drawn, else 503."""
        is_open = self.batcher.is_open
        content = {"status": "ok" if is_open else "stopped", "queued": self.batcher.queued}
        return JSONResponse(content, 200 if is_open else 503)

    async def list_models(self, request: Request) -> Response:
        """Answers with the only model."""
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def describe_model(self, request: Request) -> Response:
        """Answers with the model of a name."""
        check_model({"model": request.path_params["name"]}, self.name)
        return JSONResponse(self._describe())

    def _describe(self) -> dict[str, Any]:
        return {
            "id": self.name, "object": "model", "created": self._started, "owned_by": "corl-jax"
        }  # fmt: skip

    async def answer(self, request: Request) -> Response:
        """Answers a question about an image."""
        body = await self._read_json(request)
        check_model(body, self.name)
        chat = await self._run(read_chat, body)
        job = await self._run(self.engine.prepare_answers, chat)
        samples = await self._wait(request, job)
        texts = await self._run(self.engine.read_texts, samples, job)
        content = responses.describe_answers(self.name, job, texts, chat.stop)
        if not chat.stream:
            return JSONResponse(content)
        events = responses.split_in_events(content, chat.include_usage)
        return StreamingResponse(iter(events), media_type="text/event-stream")

    async def draw(self, request: Request) -> Response:
        """Draws images of a prompt."""
        body = await self._read_json(request)
        check_model(body, self.name)
        side = self.engine.limits.image_side
        drawing = await self._run(read_image_request, body, side)
        job = await self._run(self.engine.prepare_images, drawing)
        samples = await self._wait(request, job)
        return JSONResponse(await self._run(responses.describe_images, job, samples, side))

    # ---- what they do

    def _protect(self, handler: Handler) -> Handler:
        """Returns a handler that asks for the key first, and bounds the requests at once."""

        async def run(request: Request) -> Response:
            sent_key = request.headers.get("authorization", "").encode()
            # compare_digest takes the same time for every wrong key.
            if self._key is not None and not hmac.compare_digest(sent_key, self._key):
                message = "expected the server's key: Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key")
            if self._active >= self._max_requests:
                raise _refuse_for_now()
            self._active += 1
            try:
                return await handler(request)
            finally:
                self._active -= 1

        return run

    async def _read_json(self, request: Request) -> Any:
        """Returns the body. Raises: ApiError if it is too large or no JSON."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"Content-Type: found {kind!r}; expected application/json")
        try:
            async with asyncio.timeout(BODY_S):
                data = await _read_body(request)
        except TimeoutError:
            raise ApiError(408, f"the whole body did not arrive within {BODY_S:g} s") from None
        try:
            return await self._run(json.loads, data)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON ({error})") from error

    async def _run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Runs a function in a thread, so that others are served meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *args)

    async def _wait(self, request: Request, job: Job) -> Sequence[Any]:
        """Returns the samples of a job.

        Raises:
            ApiError: there is no room for them, or the server is stopping.
            ClientDisconnect: nobody waits for the answer any more.
        """
        try:
            futures = self.batcher.submit(job.program, job.rows)
        except QueueFull:
            raise _refuse_for_now() from None
        except Closed:
            raise ApiError(503, "the server is stopping", code="unavailable") from None
        samples = asyncio.gather(*map(asyncio.wrap_future, futures))
        # After the body a message comes only when the client has gone.
        gone = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({samples, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not samples.done():
                raise ClientDisconnect
            return samples.result()
        finally:
            gone.cancel()
            _cancel_all(samples, futures)


async def _read_body(request: Request) -> bytes:
    """Returns the body. Raises: ApiError if it is too large."""
    length = request.headers.get("content-length", "0")
    parts, size = [], int(length) if length.isdecimal() else 0
    if size <= MAX_BODY_BYTES:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > MAX_BODY_BYTES:
                break
    if size > MAX_BODY_BYTES:
        raise ApiError(413, f"the body has more than {MAX_BODY_BYTES:,} bytes")
    return b"".join(parts)


def _cancel_all(samples: asyncio.Future, futures: Sequence[Future]) -> None:
    """Takes samples out of the queue that nobody waits for."""
    if not samples.done():
        samples.cancel()
    for future in futures:
        future.cancel()  # without effect on one that is drawn


def _refuse_for_now() -> ApiError:
    return ApiError(429, "too many requests wait; try again later", code="rate_limit_exceeded")


# ---- errors


def _make_error(status: int, message: str, code: str | None, param: str | None) -> Response:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    # It may quote the request, which can be long and hold what no UTF-8 can.
    message = replace_surrogates(message[:MAX_MESSAGE])
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)


async def _answer_error(request: Request, error: ApiError) -> Response:
    return _make_error(error.status, error.message, error.code, error.param)


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return _make_error(error.status_code, message, None, None)


async def _answer_nobody(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=CLOSED_REQUEST)


async def _answer_unexpected_error(request: Request, error: Exception) -> Response:
    # The log has the traceback; a client learns no details of the machine.
    return _make_error(500, "the request failed; the server's log says why", None, None)
