"""The HTTP server: OpenAI's completions, chat completions and models; health, metrics, a page to try.

Start at `make_app`. Every answer to bad input is OpenAI's error body; none has a path or a traceback.
"""

import asyncio
import difflib
import hmac
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import tinier
from tinier.errors import InputError, TinierError
from tinier.families import split_adapter
from tinier.serving.embeddings import Embeddings, start_embeddings
from tinier.serving.generation import Generation, start_chat, start_completion
from tinier.serving.metrics import Metrics
from tinier.serving.model import EngineFailure, Model, Overloaded, Unavailable
from tinier.serving.protocol import (
    ApiError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    LoadBody,
    TokenizeBody,
    UnloadBody,
    event,
)
from tinier.serving.responses import Responses, ResponsesBody, start_response
from tinier.serving.store import ModelStore, Source
from tinier.serving.tokens import detokenize, tokenize

log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=BaseModel)
Start = Callable[[Model, Any], Awaitable[Any]]
"""A Generation, Responses or Embeddings"""
_OPEN_PATHS = ("/health", "/health/live", "/health/ready", "/ping", "/metrics", "/")
_RETRY_AFTER = 1
_LAST_WORDS_SECONDS = 10
# of all requests together, while they are read: their number has no limit before the queue's
_MOST_BODY_BYTES = 256 << 20
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass
class Server:
    """What the endpoints share."""

    store: ModelStore
    metrics: Metrics
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    timeout: float = 600.0
    """Seconds until a request is given up, unless it says less."""
    load_folder: Path | None = None
    """Models in it may be loaded over HTTP."""
    internal_key: str | None = None
    """What Triton's models carry; opens everything."""
    cors_origins: tuple[str, ...] = ()
    """Pages that may ask from a browser."""
    only_local: bool = False
    """No key, and for this machine alone: only what names it as this machine is answered, so that no web
    page can ask through its visitor's browser."""
    draining: bool = False
    """No new work is taken."""
    num_active: int = field(default=0, init=False)
    """Requests that are being answered."""
    _body_bytes: int = field(default=0, init=False)
    _gave_up: bool = field(default=False, init=False)
    _limits: set[asyncio.Timeout] = field(default_factory=set, init=False)

    @asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """Raises TimeoutError past so many seconds, Unavailable when `give_up` is called."""
        try:
            async with asyncio.timeout(seconds) as limit:
                self._limits.add(limit)
                yield
        except TimeoutError:
            if self._gave_up:
                raise Unavailable("the server is shutting down") from None
            raise
        finally:
            self._limits.discard(limit)

    def give_up(self) -> None:
        """End what is in flight: the time to drain is over."""
        self._gave_up = True
        for limit in list(self._limits):
            limit.reschedule(0)

    def hold_body(self, num_bytes: int) -> None:
        """Count bytes of bodies in memory; negative: they are gone. Raises Overloaded past the limit."""
        self._body_bytes += num_bytes
        if num_bytes > 0 and self._body_bytes > max(_MOST_BODY_BYTES, self.max_body_bytes):
            raise Overloaded("too many bodies at once")


def make_app(server: Server, more: Sequence[Route] = ()) -> ASGIApp:
    """more: routes under /internal."""

    async def completions(request: Request) -> Response:
        return await _generate(server, request, CompletionBody, start_completion)

    async def chat(request: Request) -> Response:
        return await _generate(server, request, ChatBody, start_chat)

    async def responses(request: Request) -> Response:
        return await _generate(server, request, ResponsesBody, start_response)

    async def embeddings(request: Request) -> Response:
        return await _generate(server, request, EmbeddingsBody, start_embeddings)

    async def models(request: Request) -> Response:
        data = [_model_entry(server.store, model) for model in server.store.models]
        return JSONResponse({"object": "list", "data": data})

    async def one_model(request: Request) -> Response:
        model = _find(server, request.path_params["name"])
        return JSONResponse(_model_entry(server.store, model))

    async def tokens(request: Request) -> Response:
        body = await _body(server, request, TokenizeBody)
        return JSONResponse(await tokenize(_find_or_only(server, body.model), body))

    async def text(request: Request) -> Response:
        body = await _body(server, request, DetokenizeBody)
        return JSONResponse(await detokenize(_find_or_only(server, body.model), body))

    async def version(request: Request) -> Response:
        return JSONResponse({"version": tinier.__version__})

    async def load(request: Request) -> Response:
        body = await _body(server, request, LoadBody)
        source = _allowed_source(server, body.model)
        try:
            model = await server.store.load(source)
        except TinierError as error:
            log.warning("%s was not loaded: %s", body.model, error)
            # where models lie is nobody's business
            text = str(error)
            for folder in filter(None, split_adapter(source.model)):
                text = text.replace(str(Path(folder).parent), "…")
            raise ApiError(400, f"The model was not loaded: {text}", param="model") from None
        return JSONResponse(_model_entry(server.store, model))

    async def unload(request: Request) -> Response:
        body = await _body(server, request, UnloadBody)
        if server.load_folder is None:
            raise _no_loading()
        if not await server.store.unload(body.model):
            raise _not_found(body.model)
        return JSONResponse({"id": body.model, "object": "model", "deleted": True})

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> Response:
        states = {model.label: _state(model) for model in server.store.models}
        is_ready = not server.draining and bool(states) and set(states.values()) == {"ready"}
        status = "draining" if server.draining else "ready" if is_ready else "not ready"
        return JSONResponse({"status": status, "models": states}, 200 if is_ready else 503)

    async def metrics(request: Request) -> Response:
        return Response(server.metrics.render(), media_type="text/plain; version=0.0.4")

    async def page(request: Request) -> Response:
        return HTMLResponse(files("tinier.serving").joinpath("page.html").read_text("utf-8"))

    app = Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/responses", responses, methods=["POST"]),
            Route("/v1/embeddings", embeddings, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/load", load, methods=["POST"]),
            Route("/v1/models/unload", unload, methods=["POST"]),
            Route("/v1/models/{name:path}", one_model),
            Route("/tokenize", tokens, methods=["POST"]),
            Route("/detokenize", text, methods=["POST"]),
            Route("/version", version),
            Route("/health", ready),
            Route("/ping", ready, methods=["GET", "POST"]),
            Route("/health/ready", ready),
            Route("/health/live", live),
            Route("/metrics", metrics),
            Route("/", page),
            *more,
        ],
        exception_handlers={
            ApiError: _answer_error,
            TinierError: _answer_error,
            HTTPException: _http_error,
            ClientDisconnect: _client_gone,
            Exception: _answer_error,
        },
    )
    guarded = _Guard(app, server)
    if not server.cors_origins:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=server.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )


class _Guard:
    """API keys and where a request comes from, before anything else is looked at."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server = app, server
        self._keys = [key.encode() for key in server.api_keys]
        self._internal = [server.internal_key.encode()] if server.internal_key else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_http = scope["type"] == "http"
        if is_http:
            # clients join addresses and paths with one slash too many
            path = re.sub("/+", "/", scope["path"])
            scope["path"] = path.rstrip("/") or "/"
            foreign = self._foreign(scope)
            if foreign:
                await JSONResponse(ApiError(403, foreign).body, 403)(scope, receive, send)
                return
        if is_http and scope["path"].startswith("/internal/"):
            allowed = self._knows(scope, self._internal)
        elif is_http and scope["path"] not in _OPEN_PATHS and self._keys:
            allowed = self._knows(scope, [*self._keys, *self._internal])
        else:
            allowed = True
        if not allowed:
            error = ApiError(
                401,
                "Incorrect API key provided. Send the server's as the header Authorization: Bearer KEY.",
                kind="authentication_error",
                code="invalid_api_key",
            )
            await JSONResponse(error.body, 401, {"WWW-Authenticate": "Bearer"})(
                scope, receive, send
            )
            return
        await self._app(scope, receive, send)

    def _foreign(self, scope: Scope) -> str | None:
        """Why a browser should not be answered: it speaks for a page that is not this server's."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        allowed = self._server.cors_origins
        own = origin.split("://", 1)[-1] == host
        if origin and scope["method"] == "POST" and not own and not {origin, "*"} & {*allowed}:
            return f"Pages of {origin} may not ask this server. Start it with --cors {origin}."
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._server.only_local and scope.get("client") and name not in _LOCAL_NAMES:
            return f"This server has no API key and answers to localhost only, not to {host!r}."
        return None

    @staticmethod
    def _knows(scope: Scope, keys: list[bytes]) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        token = given[7:] if given[:7].lower() == b"bearer " else b""
        # all are compared, so that the time tells nothing
        return any([hmac.compare_digest(token, key) for key in keys])


class _Stream(Response):
    """Server-sent events of a generation; the client's leaving ends it at once."""

    def __init__(self, server: Server, generation: Generation | Responses, timeout: float) -> None:
        self._server = server
        self._generation = generation
        self._timeout = timeout
        self.status_code = 200
        self.background = None
        self.init_headers(
            {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):
                await _unless_gone(receive, self._write(send))
        finally:
            self._generation.close()
            self._server.num_active -= 1

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with (
                self._server.within(self._timeout),
                aclosing(self._generation.events()) as events,
            ):
                async for part in events:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            last = b""
        except (TinierError, TimeoutError) as error:
            self._generation.close()  # before the last words, which a client may never read
            last = event(_as_api_error(error, self._timeout).body)
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await send({"type": "http.response.body", "body": last, "more_body": False})


async def _generate(server: Server, request: Request, kind: type[Body], start: Start) -> Response:
    if server.draining:
        raise ApiError(
            503, "The server is shutting down.", kind="server_error", code="shutting_down",
            retry_after=_RETRY_AFTER,
        )  # fmt: skip
    # from here on a shutdown waits for this request
    server.num_active += 1
    streams = False
    try:
        body: Any = await _body(server, request, kind)
        model = _find(server, body.model)
        try:
            generation = await start(model, body)
        except Overloaded:
            server.metrics.refused(model.label)
            raise
        timeout = min(body.timeout or server.timeout, server.timeout)
        if body.stream:
            streams = True
            return _Stream(server, generation, timeout)
        return await _whole(server, request, generation, timeout)
    finally:
        if not streams:
            server.num_active -= 1


async def _whole(
    server: Server,
    request: Request,
    generation: Generation | Responses | Embeddings,
    timeout: float,
) -> Response:
    try:
        async with server.within(timeout):
            return JSONResponse(await _unless_gone(request.receive, generation.whole()))
    except TimeoutError as error:
        raise _as_api_error(error, timeout) from None
    finally:
        generation.close()


Result = TypeVar("Result")


async def _unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """The work's result. Raises ClientDisconnect, with the work cancelled, when the client leaves."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _body(server: Server, request: Request, kind: type[Body]) -> Body:
    """The request's body, checked. Raises ApiError, also for one that does not come in time."""
    try:
        async with server.within(server.timeout):
            return await _body_in_time(server, request, kind)
    except TimeoutError:
        text = f"The body did not come within {server.timeout:g} s. Send it again."
        raise ApiError(408, text, kind="timeout", code="timeout") from None


async def _body_in_time(server: Server, request: Request, kind: type[Body]) -> Body:
    length = request.headers.get("content-length", "")
    too_large = ApiError(
        413,
        f"The body is larger than the {server.max_body_bytes} bytes that this server takes. Send less, or "
        "start it with a larger --max-body.",
        code="too_large",
    )
    if length.isdecimal() and int(length) > server.max_body_bytes:
        raise too_large
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise ApiError(415, f"The body is encoded as {encoding!r}. Send it as it is.")
    raw = bytearray()
    try:
        async for part in request.stream():
            raw += part
            server.hold_body(len(part))
            if len(raw) > server.max_body_bytes:
                raise too_large
        return kind.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise _invalid(error, kind, bytes(raw)) from None
    finally:
        server.hold_body(-len(raw))


def _invalid(error: ValidationError, kind: type[BaseModel], raw: bytes) -> ApiError:
    """What is wrong with a body, in the words of the branch that fits it best."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"The body is no JSON: {errors[0]['msg']}.")
    body = json.loads(raw)
    if not isinstance(body, dict):
        return ApiError(400, "The body must be a JSON object.")
    field = errors[0]["loc"][0]

    def fits(one: Any) -> tuple[bool, int]:
        # where several types are allowed, one is deepest in what was sent, or is of the right type
        return not one["type"].endswith(("_type", "_parsing")), len(_path(body, one["loc"]))

    best = max((one for one in errors if one["loc"][0] == field), key=fits)
    where = ".".join(map(str, _path(body, best["loc"])))
    if best["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(best["loc"][-1]), kind.model_fields, n=1)
        hint = f". Did you mean '{near[0]}'?" if near else ""
        return ApiError(400, f"Unrecognized request argument supplied: {where}{hint}", param=where)
    if best["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{where}'.", param=where)
    return ApiError(400, f"Invalid value for '{where}': {best['msg']}.", param=where)


def _path(body: Any, location: tuple[int | str, ...]) -> list[int | str]:
    """The way into a body that an error's location names; pydantic's names for the types that it tried are
    left out."""
    found: list[int | str] = []
    for i, part in enumerate(location):
        at: Any = part
        if isinstance(body, list):
            is_there = isinstance(at, int) and at < len(body)
        else:
            is_there = isinstance(body, dict) and at in body
        if is_there:
            body = body[at]
        elif not (isinstance(body, dict) and i == len(location) - 1):
            continue  # the last one may be what is missing
        found.append(part)
    return found


def _find(server: Server, label: str) -> Model:
    model = server.store.find(label)
    if model is None:
        raise _not_found(label)
    return model


def _find_or_only(server: Server, label: str | None) -> Model:
    """Raises ApiError where no model is named, and there are several."""
    if label is not None:
        return _find(server, label)
    names = {model.name for model in server.store.models}
    if len(names) != 1:
        raise ApiError(
            400,
            f"Say which model: this server has {', '.join(sorted(names)) or 'none'}.",
            param="model",
        )
    return _find(server, names.pop())


def _not_found(label: str) -> ApiError:
    return ApiError(
        404,
        f"The model '{label}' does not exist. See /v1/models.",
        param="model",
        code="model_not_found",
    )


def _no_loading() -> ApiError:
    return ApiError(403, "This server does not load models. Start it with --allow-load FOLDER.")


def _allowed_source(server: Server, text: str) -> Source:
    """A model, or one with an adapter, in the folder that models may be loaded from, and nowhere else."""
    if server.load_folder is None:
        raise _no_loading()
    source = Source.parse(text)
    folder = server.load_folder.resolve()
    path = _folder_inside(folder, source.model)
    base, plus, adapter = source.model.rpartition("+")
    parts = (
        [path] if path or not plus else [_folder_inside(folder, part) for part in (base, adapter)]
    )
    if not all(parts):
        raise ApiError(
            404,
            f"There is no model '{source.model}' to load. Give the name of a model folder inside the "
            "server's --allow-load folder, or NAME=MODEL+ADAPTER of two.",
            param="model",
        )
    return Source(source.name, source.version, "+".join(map(str, parts)))


def _folder_inside(folder: Path, name: str) -> Path | None:
    """The folder of this name in another, however deep; None: there is none."""
    try:
        path = (folder / name).resolve()
        return path if folder in path.parents and path.is_dir() else None
    except (OSError, ValueError):  # longer than a name can be, or with a NUL in it
        return None


def _state(model: Model) -> str:
    if model.failure:
        return "failed"
    return "ready" if model.ready else "starting"


def _model_entry(store: ModelStore, model: Model) -> dict[str, Any]:
    newest = store.find(model.name) is model
    entry: dict[str, Any] = {
        "id": model.name if newest else model.label, "object": "model", "created": model.created,
        "owned_by": "tinier", "version": model.version, "status": _state(model),
    }  # fmt: skip
    if model.ready:
        entry |= {
            "max_model_len": model.ready.limits.room,
            "weight_bytes": model.ready.weight_bytes,
        }
    return entry


def _as_api_error(error: BaseException, timeout: float = 0) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(
            504,
            f"The request took more than {timeout:g} s. Ask for fewer tokens, or a longer timeout.",
            kind="timeout",
            code="timeout",
        )
    if isinstance(error, Overloaded):
        return ApiError(
            429, "The server has too many requests. Try again later.", kind="rate_limit_error",
            code="overloaded", retry_after=_RETRY_AFTER,
        )  # fmt: skip
    if isinstance(error, Unavailable):
        return ApiError(
            503, str(error), kind="server_error", code="unavailable", retry_after=_RETRY_AFTER
        )
    if isinstance(error, EngineFailure):
        return ApiError(500, str(error), kind="server_error", code="engine_failure")
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    return ApiError(
        500, "The server failed on this request. Its log says why.", kind="server_error"
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    made = _as_api_error(error)
    headers = {"Retry-After": str(made.retry_after)} if made.retry_after else {}
    return JSONResponse(made.body, made.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    url = f"{request.method} {request.url.path}"
    allowed = (error.headers or {}).get("Allow", "another method")
    text = {
        404: f"Unknown request URL: {url}. Use POST /v1/completions, POST /v1/chat/completions or GET "
        "/v1/models.",
        405: f"Not allowed to {url}. Use {allowed}.",
    }
    made = ApiError(
        error.status_code, text.get(error.status_code, error.detail), code="unknown_url"
    )
    return JSONResponse(made.body, error.status_code, error.headers)


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
