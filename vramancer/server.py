"""Starts the API server: settings in, exit status out."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from core.config import Settings
from core.devices import format_bytes
from core.errors import InsufficientMemoryError, MissingNodeError, NetworkError, VRAMancerError
from core.logs import configure_logging, get_logger
from core.security.access import nobody
from dashboard import AppGateway, Dashboard
from vramancer import __version__
from vramancer.banner import Reached, banner, cluster_lines, cluster_text
from vramancer.web.leave import leave
from vramancer.web.limits import Limits
from vramancer.web.listener import bind_socket, listen
from vramancer.web.metrics import MetricsServer
from vramancer.web.server import INTERRUPTED, FrontDoor

if TYPE_CHECKING:
    from core.cluster.opening import OpenMaster
    from core.inference_pipeline import InferencePipeline

logger = get_logger(__name__)

OTHER_METRICS_PORTS = 100
"""So many ports above the usual one are tried for metrics, where nobody chose one."""
MORE_THAN_THE_ENGINE = 16
"""Requests that may be under way beside those that run and wait in the engine: they tokenize, load, move."""


_LOOK_S = 0.5


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
                    cluster = _load(pipeline, cluster, bar)
                    host, port = listener.getsockname()[:2]
                    new = token.value if token.created else None
                    reached = Reached(host, port, metrics.port, token.path, new, cluster)
                    _serve_loaded(pipeline, listener, token.value, reached)
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


def _load(pipeline: InferencePipeline, cluster: OpenMaster | None, bar: LoadingBar) -> OpenMaster | None:
    """Load the model. Where it takes machines that have not joined yet, wait for them. A token that was shown meanwhile
    is new no more."""
    came = threading.Event()
    if cluster is not None:
        cluster.master.on_change.append(lambda change, node: came.set())
    while True:
        came.clear()
        try:
            pipeline.load()
        except (MissingNodeError, InsufficientMemoryError, NetworkError) as error:
            if cluster is None or not _may_come(pipeline.settings, error):
                raise
            lines = [f"waiting for machines: {error.message}", f"  {cluster_text(cluster)}", *cluster_lines(cluster)]
            typer.echo("\n".join(lines))
            cluster = replace(cluster, token=cluster.token._replace(created=False))
        else:
            bar.finish()
            return cluster
        while not came.wait(_LOOK_S):
            pass  # Ctrl-C ends it


def _may_come(settings: Settings, error: VRAMancerError) -> bool:
    """Whether machines that join can cure it: more memory is used where devices of others may be."""
    from core.cluster.choice import divide

    _, there = divide(settings.devices.devices)
    return there is None or bool(there) or not isinstance(error, InsufficientMemoryError)


def _metrics_server(pipeline: InferencePipeline, listener: socket.socket) -> MetricsServer:
    """On the port that was chosen, or on the next free one after the usual."""
    api = pipeline.settings.api
    usual, own, others = api.metrics_port, listener.getsockname()[1], range(0)
    if "metrics_port" not in api.model_fields_set:
        others = range(usual + 1, usual + 1 + OTHER_METRICS_PORTS)
    return MetricsServer(pipeline.metrics.registry, api.host, usual, [port for port in others if port != own])


def _serve_loaded(pipeline: InferencePipeline, listener: socket.socket, token: str, reached: Reached) -> None:
    from core.api import create_app
    from core.api.admission import admission_of

    board, gateway = _dashboard(pipeline, token)
    more, signed_in = ([board.blueprint], board.gate.signed_in) if board is not None else ([], nobody)
    app = create_app(pipeline, token=token, version=__version__, more=more, signed_in=signed_in)
    gateway.bind(app.wsgi_app)
    text = banner(pipeline, reached)
    engine = pipeline.settings.engine
    limits = Limits.of(pipeline.settings.api, engine.max_queue + engine.max_batch_size + MORE_THAN_THE_ENGINE)
    listen(listener, limits.max_connections)
    live = board.live if board is not None else None
    door = FrontDoor(app, admission_of(app), limits, on_ready=lambda: typer.echo(text), live=live)
    door.run_until_stopped(listener)


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
