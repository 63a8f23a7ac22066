"""Runs the HTTP server until it is told to stop. Start at `serve`; from Python, `Service` is the same in a
thread: start, query, stop."""

import asyncio
import atexit
import contextlib
import logging
import math
import socket
import threading
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import uvicorn

from tinier.engine import EngineConfig
from tinier.errors import InputError
from tinier.serving.app import Server, make_app
from tinier.serving.config import LOOPBACK, ServeConfig, address
from tinier.serving.connections import Connection
from tinier.serving.metrics import Metrics
from tinier.serving.model import Model
from tinier.serving.store import ModelStore, Source
from tinier.serving.triton import Attached, Triton, check_installed

try:
    from uvloop import new_event_loop
except ImportError:  # not on Windows
    from asyncio import new_event_loop  # type: ignore[assignment]

log = logging.getLogger(__name__)

_BACKLOG = 4096
# for the errors that end what is in flight when the time to drain is over
_LAST_WORDS_SECONDS = 5.0


class HttpServer(uvicorn.Server):
    """uvicorn, but SIGTERM lets requests in flight finish while new ones are told to go elsewhere."""

    def __init__(self, config: uvicorn.Config, server: Server, drain_seconds: float) -> None:
        super().__init__(config)
        self._server = server
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self.triton: Triton | None = None

    @property
    def models(self) -> list[Model]:
        return self._server.store.models

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._server.draining:  # asked a second time
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self.drain)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def drain(self) -> None:
        """Stop when the requests in flight are answered."""
        if not self._server.draining:
            self._server.draining = True
            self._draining = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        log.warning("shutting down: %d requests in flight", self._server.num_active)
        if not await self._idle(self._drain_seconds):
            log.warning("%d requests are ended: --drain is over", self._server.num_active)
            self._server.give_up()
            await self._idle(_LAST_WORDS_SECONDS)
        if self.triton is not None:
            await asyncio.to_thread(self.triton.stop)
        self.should_exit = True

    async def _idle(self, seconds: float) -> bool:
        """Whether all requests are answered within so many seconds."""
        end = self._loop.time() + seconds
        while self._server.num_active and self._loop.time() < end:  # Triton's are among them
            await asyncio.sleep(0.02)
        return not self._server.num_active


Started = Callable[[int, HttpServer], None]
"""Called with the port (0: there is none) and the server once requests are taken"""


async def run(
    sources: list[Source], engine: EngineConfig, config: ServeConfig, started: Started
) -> None:
    """Load the models and serve them. Raises InputError before anything is loaded, Unavailable."""
    if config.triton:
        check_installed()
        names = {source.name for source in sources}
        for name in names:
            if f"{name}_stream" in names:
                raise InputError(
                    f"{name}_stream is what Triton calls {name}'s stream. Use other names."
                )
    listener = _listen(config)
    with contextlib.ExitStack() as closing:
        closing.callback(listener.close)
        if config.uds is not None:
            closing.callback(config.uds.unlink, missing_ok=True)
        metrics = Metrics()
        store = ModelStore(
            engine, replicas=config.replicas, max_queue=config.max_queue,
            memory_bytes=config.memory_bytes, metrics=metrics, log_level=config.log_level,
            adapters=config.adapters,
        )  # fmt: skip
        server = Server(
            store,
            metrics,
            config.api_keys,
            config.max_body_bytes,
            config.timeout,
            config.load_folder,
            cors_origins=config.cors_origins,
            only_local=(config.uds is not None or config.host in LOOPBACK) and not config.api_keys,
        )
        try:
            await store.load_all(sources)
            await _serve(listener, server, sources, engine, config, started)
        finally:
            await store.close()


async def _serve(
    listener: socket.socket, server: Server, sources: list[Source], engine: EngineConfig,
    config: ServeConfig, started: Started,
) -> None:  # fmt: skip
    """Take requests until told to stop. The models are loaded."""
    sockets, routes, triton = [listener], [], None
    if config.triton:
        models = server.store.models
        triton = Triton(
            [m.label for m in models], host=config.host, port=config.port,
            max_batch_size=engine.max_batch_size, verbose=config.log_level <= logging.INFO,
            api_key=config.api_keys[0] if config.api_keys else None,
        )  # fmt: skip
        known = {
            m.label: Source(m.name, m.version, source.model)
            for m, source in zip(models, sources, strict=True)
        }
        routes = Attached(server.store, known).routes()
        server.internal_key = triton.key
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        inner.bind(triton.socket_path)
        sockets.append(inner)
    settings = uvicorn.Config(
        make_app(server, routes), log_config=None, access_log=False, lifespan="off",
        server_header=False, timeout_graceful_shutdown=5, backlog=_BACKLOG, http=Connection,
        timeout_keep_alive=math.ceil(config.keep_alive),
    )  # fmt: skip
    http = HttpServer(settings, server, config.drain_seconds)
    for one in sockets:
        one.listen(_BACKLOG)
    serving = asyncio.create_task(http.serve(sockets))
    try:
        if triton is not None:
            await asyncio.to_thread(triton.start)
            http.triton = triton
        while not (http.started or serving.done()):  # from then on it hears signals
            await asyncio.sleep(0.005)
        started(0 if config.uds else listener.getsockname()[1], http)
        await serving
    finally:
        http.should_exit = True
        await asyncio.wait({serving})
        if triton is not None:
            await asyncio.to_thread(triton.stop)


def _announce(config: ServeConfig, engine: EngineConfig, port: int, http: HttpServer) -> None:
    if config.uds is None and config.host not in LOOPBACK and not config.api_keys:
        log.warning(
            "listening on %s without an API key: whoever can connect can use it", config.host
        )
    names = ", ".join(model.name for model in http.models)
    print(f"serving {names} on {config.uds or address(config.host, port)}", flush=True)
    for model in http.models:
        if model.ready is not None:
            tokens, size = model.ready.num_blocks * engine.block_size, model.ready.cache_bytes
            replicas = len(model.engines.replicas)
            count = f"{replicas} × " if replicas > 1 else ""
            print(
                f"{model.label}: {count}KV cache of {tokens:,} tokens, {size / 2**30:.2f} GiB; a request "
                f"has up to {model.ready.limits.room:,}",
                flush=True,
            )
    if config.triton:
        first = config.port
        print(f"Triton: HTTP {first}, gRPC {first + 1}, metrics {first + 2}", flush=True)


def serve(sources: list[Source], engine: EngineConfig, config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C."""

    def started(port: int, http: HttpServer) -> None:
        _announce(config, engine, port, http)

    _run_loop(run(sources, engine, config, started))


class Service:
    """A server in a thread of this process, for tests and notebooks.

    with Service(["smollm2-135m"]) as service:
        service.url   # http://127.0.0.1:PORT
    """

    def __init__(
        self, models: list[str], engine: EngineConfig | None = None,
        config: ServeConfig | None = None,
    ) -> None:  # fmt: skip
        self._sources = [Source.parse(model) for model in models]
        self._engine = engine or EngineConfig()
        self._config = config or ServeConfig(port=0)
        self._up = threading.Event()
        self._error: BaseException | None = None

    def __enter__(self) -> "Service":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _started(self, port: int, http: HttpServer) -> None:
        # a Unix socket has no address: clients are told its path
        self.url = "http://localhost" if self._config.uds else address(self._config.host, port)
        self._http = http
        self._loop = asyncio.get_running_loop()
        self._up.set()

    def start(self) -> None:
        """Load the models and listen. Raises what loading raises."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # Python waits at its end for the models' processes
        self._up.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Let requests in flight finish, then end."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._http.drain)
            self._thread.join()
        atexit.unregister(self.stop)

    def _run(self) -> None:
        try:
            _run_loop(run(self._sources, self._engine, self._config, self._started))
        except BaseException as error:
            self._error = error
        finally:
            self._up.set()


def _run_loop(main: Coroutine[Any, Any, None]) -> None:
    """asyncio.run on uvloop's event loop, where there is one."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main)


def _listen(config: ServeConfig) -> socket.socket:
    """A listening socket, before the models are loaded: an address that is taken is an error at once. Who
    connects while they load waits."""
    host, port = config.host, config.port + 3 if config.triton else config.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where: Any = (host, port)
    shown, advice = address(host, port), "Use another --host or --port."
    if config.uds is not None:
        family, where, shown = socket.AF_UNIX, str(config.uds), str(config.uds)
        advice = "Use another --uds, or remove the file if no server listens there."
    listener = socket.socket(family, socket.SOCK_STREAM)
    if config.uds is None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(where)
        # two that are bound do not disturb each other, two that listen do
        listener.listen(_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {shown}: {why}. {advice}") from None
    return listener
