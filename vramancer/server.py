"""Starts the API server: settings in, exit status out."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from core.config import Settings
from core.defaults import NO_MODEL
from core.devices import format_bytes
from core.errors import VRAMancerError
from core.logs import configure_logging, get_logger
from core.security.access import nobody
from dashboard import AppGateway, Dashboard
from vramancer import __version__
from vramancer.banner import Reached, banner, stub_banner, waiting, without_model
from vramancer.late import LateLoad, may_come
from vramancer.web.leave import leave
from vramancer.web.limits import Limits
from vramancer.web.listener import bind_socket, listen
from vramancer.web.metrics import MetricsServer
from vramancer.web.server import INTERRUPTED, FrontDoor

if TYPE_CHECKING:
    from core.cluster.master import Master
    from core.cluster.opening import OpenMaster
    from core.inference_pipeline import InferencePipeline

logger = get_logger(__name__)

OTHER_METRICS_PORTS = 100
"""So many ports above the usual one are tried for metrics, where nobody chose one."""
MORE_THAN_THE_ENGINE = 16
"""Requests that may be under way beside those that run and wait in the engine: they tokenize, load, move."""


def serve(settings: Settings) -> int:
    """Load the model, then listen, until Ctrl-C or SIGTERM. Returns the exit status.

    Raises:
        VRAMancerError: the server cannot start; nothing is left running.
    """
    from core.cluster.opening import open_master
    from core.inference_pipeline import InferencePipeline
    from core.security.token import check_bind, resolve_token

    configure_logging(settings.logging)
    check_bind(settings)
    token, cluster = resolve_token(settings), open_master(settings, version=__version__)
    master = cluster.master if cluster is not None else None
    try:
        with bind_socket(settings.api.host, settings.api.port) as listener, loading_bar() as bar:
            pipeline = InferencePipeline(settings, on_progress=bar.report, cluster=master)
            metrics = _metrics_server(pipeline, listener)
            try:
                if settings.api.metrics_port:
                    metrics.start()
                with _interruptible():
                    reason = _load(pipeline, cluster)
                    bar.finish()
                    host, port = listener.getsockname()[:2]
                    new = token.value if token.created else None
                    reached = Reached(host, port, metrics.port, token.path, new, cluster)
                    if pipeline.settings.model.name == NO_MODEL:
                        text = without_model(pipeline, reached)
                        _door(pipeline, listener, token.value, lambda: typer.echo(text)).run_until_stopped(listener)
                    elif reason is not None and pipeline.settings.backend.allow_stub:
                        _serve_stub(pipeline, listener, token.value, reached, reason)
                    elif reason is None or master is None:
                        _serve_loaded(pipeline, listener, token.value, reached)
                    else:
                        _serve_waiting(pipeline, listener, token.value, reached, master, reason)
            except KeyboardInterrupt:
                bar.finish()
                typer.echo("stopped before the server was ready", err=True)
                return leave(INTERRUPTED)
            finally:
                pipeline.shutdown()
                metrics.stop()
    finally:
        if master is not None:
            master.close()
    logger.info("stopped")
    return leave(0)


def _load(pipeline: InferencePipeline, cluster: OpenMaster | None) -> str | None:
    """Load the model. What it waits for, if it takes machines that have not joined yet; or why a stub answers."""
    if pipeline.settings.model.name == NO_MODEL:
        pipeline.open_without_model()
        return None
    try:
        pipeline.load()
    except VRAMancerError as error:
        backend = pipeline.settings.backend
        if backend.allow_stub and not backend.upstreams:
            logger.warning("no model could be loaded: a stub answers", error=error.message)
            return error.message
        if cluster is None or not may_come(pipeline.settings, error):
            raise
        return error.message
    return None


def _metrics_server(pipeline: InferencePipeline, listener: socket.socket) -> MetricsServer:
    """On the port that was chosen, or on the next free one after the usual."""
    api = pipeline.settings.api
    usual, own, others = api.metrics_port, listener.getsockname()[1], range(0)
    if "metrics_port" not in api.model_fields_set:
        others = range(usual + 1, usual + 1 + OTHER_METRICS_PORTS)
    return MetricsServer(pipeline.metrics.registry, api.host, usual, [port for port in others if port != own])


def _serve_loaded(pipeline: InferencePipeline, listener: socket.socket, token: str, reached: Reached) -> None:
    text = banner(pipeline, reached)
    _door(pipeline, listener, token, lambda: typer.echo(text)).run_until_stopped(listener)


def _serve_stub(
    pipeline: InferencePipeline, listener: socket.socket, token: str, reached: Reached, reason: str
) -> None:
    """Without a model: chats and completions are answered by a stub until one is loaded."""
    text = stub_banner(reason, reached)
    _door(pipeline, listener, token, lambda: typer.echo(text)).run_until_stopped(listener)


def _serve_waiting(
    pipeline: InferencePipeline, listener: socket.socket, token: str, reached: Reached, master: Master, reason: str
) -> None:
    """Health and state are answered while the model waits for machines. Raises what it cannot be loaded for."""

    def ready() -> None:
        typer.echo(waiting(reason, reached))
        late.start()

    known = reached.shown()
    door = _door(pipeline, listener, token, ready)
    late = LateLoad(
        pipeline, master, reason, on_loaded=lambda: typer.echo(banner(pipeline, known)), on_failed=door.stop
    )
    try:
        door.run_until_stopped(listener)
    finally:
        pipeline.shutdown()
        late.close()
    if late.error is not None:
        raise late.error


def _door(pipeline: InferencePipeline, listener: socket.socket, token: str, on_ready: Callable[[], None]) -> FrontDoor:
    """The whole application behind a listening socket."""
    from core.api import create_app
    from core.api.admission import admission_of

    board, gateway = _dashboard(pipeline, token)
    more, signed_in = ([board.blueprint], board.gate.signed_in) if board is not None else ([], nobody)
    app = create_app(pipeline, token=token, version=__version__, more=more, signed_in=signed_in)
    gateway.bind(app.wsgi_app)
    engine = pipeline.settings.engine
    limits = Limits.of(pipeline.settings.api, engine.max_queue + engine.max_batch_size + MORE_THAN_THE_ENGINE)
    listen(listener, limits.max_connections)
    live = board.live if board is not None else None
    return FrontDoor(app, admission_of(app), limits, on_ready=on_ready, live=live)


def _dashboard(pipeline: InferencePipeline, token: str) -> tuple[Dashboard | None, AppGateway]:
    """The dashboard, unless it is off, and what has to be bound to the application that it is part of."""
    settings, gateway = pipeline.settings, AppGateway(token)
    if not settings.dashboard.enabled:
        return None, gateway
    board = Dashboard(
        gateway,
        settings.dashboard,
        bound_to=settings.api.host,
        max_body_bytes=settings.api.max_body_bytes,
        version=__version__,
    )
    return board, gateway


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, until the server handles both itself."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


_LOG_EVERY_S = 2.0


class LoadingBar:
    """Told of bytes as they are loaded. On a terminal it is drawn until `finish`; without one, and for models that are
    loaded later, quarters are logged, unless all goes quickly. `clock` gives seconds."""

    def __init__(self, progress: Progress, *, drawn: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = progress
        self._task = progress.add_task("loading weights", total=None, visible=False)
        self._drawn = drawn
        self._clock = clock
        self._last_bytes = 0
        self._logged_quarters = 0
        self._logged_s = clock()

    def report(self, done_bytes: int, total_bytes: int) -> None:
        """Parts that several stages read may make `done_bytes` more than the total."""
        done_bytes = min(done_bytes, total_bytes)
        if done_bytes < self._last_bytes or self._last_bytes == 0:  # another load
            self._logged_quarters, self._logged_s = 0, self._clock()
        self._last_bytes = done_bytes
        if not self._drawn:
            self._log(done_bytes, total_bytes)
            return
        self._progress.update(self._task, completed=done_bytes, total=total_bytes, visible=True)
        if not self._progress.live.is_started:
            self._progress.start()

    def _log(self, done_bytes: int, total_bytes: int) -> None:
        now_s, quarters = self._clock(), 4 * done_bytes // max(1, total_bytes)
        if quarters > self._logged_quarters and now_s - self._logged_s >= _LOG_EVERY_S:
            self._logged_quarters, self._logged_s = quarters, now_s
            logger.info("loading weights", percent=25 * quarters, of=format_bytes(total_bytes))

    def finish(self) -> None:
        """From now on nothing is drawn. Safe to call twice."""
        self._drawn = False
        self._progress.stop()


@contextmanager
def loading_bar() -> Iterator[LoadingBar]:
    """A progress bar on standard error that appears with its first report."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar = LoadingBar(progress, drawn=console.is_terminal)
    try:
        yield bar
    finally:
        bar.finish()
