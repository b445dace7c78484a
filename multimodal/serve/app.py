"""The ASGI application: routes, API keys, accounting of requests, health, metrics and reloads."""

import asyncio
import base64
import functools
import hashlib
import hmac
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from multimodal.serve.answers import EventStream, error_response, json_response
from multimodal.serve.bodies import read_params
from multimodal.serve.calls import Call
from multimodal.serve.chat import complete_chat
from multimodal.serve.checkpoints import Checkpoint, Checkpoints
from multimodal.serve.embeddings import embed_inputs
from multimodal.serve.errors import ApiError, as_api_error, stopping
from multimodal.serve.logs import log
from multimodal.serve.looks import look_into
from multimodal.serve.media_answers import draw, speak
from multimodal.serve.metrics import Labels, Metrics
from multimodal.serve.native import answer_task
from multimodal.serve.openapi import api_description
from multimodal.serve.realtime import LiveSession
from multimodal.serve.settings import Settings
from multimodal.serve.tasks import described
from multimodal.serve.transcriptions import transcribe_file
from multimodal.texts import shortened

PAGE = Path(__file__).with_name("page.html")
"""The web page at / and /docs."""
ENDPOINTS: dict[str, Callable[..., Awaitable[Any]]] = {
    "/v1/tasks/{task:path}/look": look_into,
    "/v1/tasks/{task:path}": answer_task,
    "/v1/chat/completions": complete_chat,
    "/v1/audio/transcriptions": transcribe_file,
    "/v1/embeddings": embed_inputs,
    "/v1/audio/speech": speak,
    "/v1/images/generations": draw,
}
LIVE = "/v1/realtime"
KEY_PROTOCOL = "openai-insecure-api-key."  # prefix of a key among the protocols of a WebSocket, where browsers cannot send a header


class Service:
    """The state of an application."""

    def __init__(self, checkpoints: Sequence[Checkpoint], settings: Settings) -> None:
        self.checkpoints, self.settings = Checkpoints(checkpoints), settings
        self.metrics = Metrics()
        self.stopping = False
        self.open = 0  # number of open requests
        self.live: set[LiveSession] = set()
        self.ending = asyncio.Event()  # set to end all live sessions
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.keys]

    def check_key(self, request: HTTPConnection) -> None:
        """Raise a 401 unless the request has one of the keys; without keys, every request may pass."""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        for protocol in request.scope.get("subprotocols", ()):
            if not kind and protocol.startswith(KEY_PROTOCOL):
                kind, given = "bearer", protocol.removeprefix(KEY_PROTOCOL)
        digest = hashlib.sha256(given.strip().encode("utf-8", "replace")).digest()
        # all keys are compared in constant time, so that the time gives no hint
        right = [hmac.compare_digest(digest, key) for key in self._keys]
        if self._keys and not (any(right) and kind.lower() == "bearer"):
            raise ApiError(401, "wanted 'Authorization: Bearer KEY' with a key of this service", code="invalid_api_key")

    def check(self, request: HTTPConnection) -> None:
        """Raise an error for a request that is refused before its body is read."""
        self.check_key(request)
        # cross-origin: a web page of another host, in the browser of somebody who can reach this service
        origin = request.headers.get("origin", "")
        if origin and _host_of(origin) != request.headers.get("host", ""):
            raise ApiError(
                403, f"requests from web pages of {shortened(origin, 100)} are refused", code="foreign_origin"
            )
        places = len(self.checkpoints.by_name) * (self.settings.rows + self.settings.queue)
        if self.open >= places:
            raise ApiError(429, f"{self.open} requests are open; try again later", code="queue_full", retry_s=1)

    def check_live(self, socket: WebSocket) -> None:
        """Raise an error if a live session may not begin."""
        self.check(socket)
        most = self.settings.live_sessions
        if self.ending.is_set():
            raise stopping()
        if len(self.live) >= most:
            raise ApiError(429, f"{most} live sessions are open; try again later", code="queue_full", retry_s=5)

    async def end_live(self, patience_s: float) -> None:
        """End all live sessions after they finish their open sounds. patience_s: how long to wait for them."""
        self.ending.set()
        until = time.monotonic() + patience_s
        while self.live and time.monotonic() < until:
            await asyncio.sleep(0.02)

    def gauges(self) -> list[tuple[str, Labels, float]]:
        """(name, labels, value) of the counters of the schedulers, and the number of live sessions."""
        found: list[tuple[str, Labels, float]] = [("live_sessions", (), len(self.live))]
        for name, checkpoint in self.checkpoints.by_name.items():
            scheduler, model = checkpoint.scheduler, ("model", name)
            load = scheduler.load
            found += [
                ("tokens_total", (("direction", "read"), model), load.read),
                ("tokens_total", (("direction", "written"), model), load.written),
                ("steps_total", (model,), load.steps),
                ("passes_total", (model,), load.passes),
                ("packed_total", (model,), load.packed),
                ("rows", (model,), load.rows),
                ("rows_most", (model,), scheduler.settings.rows),
                ("waiting", (model,), load.waiting),
                ("waiting_tokens", (model,), scheduler.waiting_tokens),
                ("open_requests", (model,), scheduler.leases),
            ]
        return found

    async def reload(self, name: str) -> None:
        """Reload a checkpoint in a thread of its own."""
        checkpoint = self.checkpoints.named(name)
        await to_thread.run_sync(checkpoint.reload)
        self.metrics.add("reloads_total", model=name)


def make_app(
    checkpoints: Sequence[Checkpoint], settings: Settings, *, patience_s: float = 600.0, on_hangup: bool = False
) -> Starlette:
    """The ASGI application that serves these checkpoints.

    patience_s: seconds that a stop waits for open requests. on_hangup: whether SIGHUP reloads all checkpoints.

    Raises:
        ConfigError: there is no checkpoint, or two have one name.
    """
    service = Service(checkpoints, settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        if on_hangup and hasattr(signal, "SIGHUP"):
            with suppress(ValueError, RuntimeError, NotImplementedError):  # not in the main thread
                loop.add_signal_handler(signal.SIGHUP, functools.partial(_reload_all, service, loop))
        log.info("started", extra={"fields": {"models": list(service.checkpoints.by_name)}})
        try:
            yield
        finally:
            service.stopping = True
            await service.end_live(patience_s)
            for name, checkpoint in service.checkpoints.by_name.items():
                if not await to_thread.run_sync(checkpoint.close, patience_s):
                    log.warning("stopped before its end", extra={"fields": {"model": name}})
            log.info("stopped")

    page = PAGE.read_text(encoding="utf-8")
    shown = Response(page, media_type="text/html", headers=page_headers(page))
    pages = ("/", "/docs")  # the page chooses its view by its URL
    get = ["GET"]
    routes = [
        *(Route(path, lambda _: shown, methods=get) for path in pages),
        Route("/openapi.json", functools.partial(_openapi, service), methods=get),
        Route("/health", functools.partial(_health, service), methods=get),
        Route("/metrics", functools.partial(_metrics, service), methods=get),
        Route("/v1/models", functools.partial(_models, service), methods=get),
        Route("/v1/models/{name}", functools.partial(_models, service), methods=get),
        Route("/v1/models/{name}/reload", functools.partial(_reload, service), methods=["POST"]),
        Route("/v1/tasks", functools.partial(_tasks, service), methods=get),
        *(Route(path, _endpoint(service, path, handler), methods=["POST"]) for path, handler in ENDPOINTS.items()),
        WebSocketRoute(LIVE, _live(service)),
    ]
    handlers: dict[Any, Any] = {HTTPException: _no_such_page, ApiError: _refused, Exception: _refused}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirect would use the host in the client's own header
    app.state.service = service
    return app


def page_headers(page: str) -> dict[str, str]:
    """Headers that restrict the page to its own script and style, and to requests to this service."""

    def own(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{found}'" for found in hashes) or "'none'"

    policy = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "script-src": own("script"),
        "style-src": own("style"),
        "img-src": "data: blob:",
        "media-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def _host_of(origin: str) -> str | None:
    """The host and port of an origin; None: it is malformed."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _reload_all(service: Service, loop: asyncio.AbstractEventLoop) -> None:
    async def one(name: str) -> None:
        try:
            await service.reload(name)
        except Exception as error:
            log.error("reload failed", exc_info=error, extra={"fields": {"model": name, "reason": shortened(error)}})

    for name in service.checkpoints.by_name:
        task = loop.create_task(one(name))
        _reloads.add(task)
        task.add_done_callback(_reloads.discard)


_reloads: set[asyncio.Task[None]] = set()  # an event loop holds its tasks only weakly


def _endpoint(service: Service, path: str, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    name = path.partition("/{")[0]

    async def endpoint(request: Request) -> Response | EventStream:
        call = Call(name, service.settings, service.metrics)
        counted = False
        try:
            service.check(request)
            service.open, counted = service.open + 1, True
            params = await read_params(request, service.settings)
            response = await _unless_disconnected(
                request, handler(call, service.checkpoints, params, **request.path_params)
            )
        except ClientDisconnect:
            call.close(disconnected=True)
            return Response(status_code=499)
        except Exception as error:
            api_error = call.failed(error)
            call.close(api_error)
            return error_response(api_error)
        except BaseException:  # the server is stopped
            call.close(disconnected=True)
            raise
        finally:
            service.open -= counted
        if not isinstance(response, EventStream):
            call.close()
        return response

    return endpoint


def _live(service: Service) -> Callable[[WebSocket], Awaitable[None]]:
    async def endpoint(socket: WebSocket) -> None:
        call = Call(LIVE, service.settings, service.metrics, live=True)
        try:
            service.check_live(socket)
        except ApiError as error:
            call.close(error)
            if "websocket.http.response" in socket.scope.get("extensions", {}):
                await socket.send_denial_response(error_response(error))
                await asyncio.sleep(0.1)  # uvicorn logs an error if this returns before the connection is closed
            else:  # without this extension the server can only send 403
                await socket.close()
            return
        session = LiveSession(call, service.checkpoints, socket, service.ending)
        service.open += 1
        service.live.add(session)
        try:
            call.close(await session.run())
        except WebSocketDisconnect:
            call.close(disconnected=True)
        except BaseException as error:
            call.close(call.failed(error) if isinstance(error, Exception) else None, disconnected=True)
            raise
        finally:
            service.open -= 1
            service.live.discard(session)

    return endpoint


async def _unless_disconnected(request: Request, answer: Awaitable[Any]) -> Any:
    """The answer. If the client disconnects first, cancel the computation and raise ClientDisconnect."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        with suppress(BaseException):
            await asyncio.gather(working, leaving, return_exceptions=True)


async def _health(service: Service, request: Request) -> Response:
    dead = [n for n, c in service.checkpoints.by_name.items() if not c.scheduler.thread.is_alive()]
    status = "stopping" if service.stopping else "failed" if dead else "ok"
    return json_response(
        {"status": status, "models": list(service.checkpoints.by_name)}, 200 if status == "ok" else 503
    )


async def _metrics(service: Service, request: Request) -> Response:
    service.check_key(request)
    return PlainTextResponse(service.metrics.text(service.gauges()), media_type="text/plain; version=0.0.4")


async def _models(service: Service, request: Request) -> Response:
    service.check_key(request)
    wanted = request.path_params.get("name")
    chosen = service.checkpoints.by_name.values() if wanted is None else [service.checkpoints.named(wanted)]
    found = [
        {
            "id": checkpoint.name,
            "object": "model",
            "created": checkpoint.created,
            "owned_by": "multimodal",
            "tasks": list(checkpoint.scheduler.model.tasks),
        }
        for checkpoint in chosen
    ]
    return json_response({"object": "list", "data": found} if wanted is None else found[0])


async def _tasks(service: Service, request: Request) -> Response:
    service.check_key(request)
    found = [
        task
        for name, checkpoint in service.checkpoints.by_name.items()
        for task in described(checkpoint.scheduler.model, name)
    ]
    about = service.settings.about
    examples = [
        {field: {"name": name, "url": url} for field, (name, url) in sample.items()}
        for sample in service.settings.examples
    ]
    more = {name: value for name, value in (("about", about), ("examples", examples)) if value}
    return json_response({"object": "list", "data": found} | more)


async def _openapi(service: Service, request: Request) -> Response:
    service.check_key(request)
    models = {name: checkpoint.scheduler.model for name, checkpoint in service.checkpoints.by_name.items()}
    return json_response(api_description(models, service.settings))


async def _reload(service: Service, request: Request) -> Response:
    service.check_key(request)
    if not service.settings.keys:
        raise ApiError(
            403,
            "a reload needs an API key, and this service has none; send it SIGHUP instead",
            code="no_keys",
        )
    name = request.path_params["name"]
    service.checkpoints.named(name)
    try:
        await service.reload(name)
    except ApiError:
        raise
    except Exception as error:
        log.error("reload failed", exc_info=error, extra={"fields": {"model": name, "reason": shortened(error)}})
        raise ApiError(
            500,
            f"the reload of model {name!r} failed, so the old one stays; the log has the reason",
            code="reload_failed",
        ) from error
    return json_response({"id": name, "object": "model", "reloaded": True})


async def _no_such_page(request: Request, error: Exception) -> Response:
    status, headers = getattr(error, "status_code", 500), getattr(error, "headers", None) or {}
    path = shortened(repr(request.url.path), 100)
    if status == 405:
        allowed = headers.get("Allow", "")
        what, code = f"{path} takes no {shortened(request.method, 20)}; use {allowed}", "method_not_allowed"
    elif request.url.path == LIVE:
        what, code = f"{path} is a WebSocket", "not_found"
    else:
        what, code = (f"there is no {path}" if status == 404 else str(error)), "not_found"
    return error_response(ApiError(status, what, code=code, headers=headers))


async def _refused(request: Request, error: Exception) -> Response:
    api_error = as_api_error(error)
    if api_error.status >= 500 and not isinstance(error, ApiError):
        endpoint = getattr(request.scope.get("route"), "path", "")  # ours, and not the address that came
        log.error("failed", exc_info=error, extra={"fields": {"endpoint": endpoint}})
    return error_response(api_error)
