"""Starts the API server: settings in, exit status out."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from core.config import Settings
from core.devices import format_bytes
from core.logs import configure_logging, get_logger
from vramancer import __version__
from vramancer.web_server import bind_socket, leave, listen, run_until_stopped

if TYPE_CHECKING:
    from core.inference_pipeline import InferencePipeline

logger = get_logger(__name__)

INTERRUPTED = 130


def serve(settings: Settings) -> int:
    """Load the model, then listen, until Ctrl-C or SIGTERM. Returns the exit status.

    Raises:
        VRAMancerError: the server cannot start; nothing is left running.
    """
    from core.api import create_app
    from core.inference_pipeline import InferencePipeline
    from core.metrics.server import MetricsServer
    from core.security.token import check_bind, resolve_token

    configure_logging(settings.logging)
    check_bind(settings)
    token, created, token_file = resolve_token(settings)
    with bind_socket(settings.api.host, settings.api.port) as listener, loading_bar() as bar:
        pipeline = InferencePipeline(settings, on_progress=bar.report)
        metrics = MetricsServer(pipeline.metrics, settings.api.host, settings.api.metrics_port)
        try:
            if settings.api.metrics_port:
                metrics.start()
            with _interruptible():
                pipeline.load()
                bar.finish()
                app = create_app(pipeline, token=token)
                banner = _banner(pipeline, listener, token if created else None, token_file)
                listen(listener)
                run_until_stopped(app, listener, pipeline.settings.api, on_ready=lambda: typer.echo(banner))
        except KeyboardInterrupt:
            bar.finish()
            typer.echo("stopped before the server was ready", err=True)
            return leave(INTERRUPTED)
        finally:
            pipeline.shutdown()
            metrics.stop()
    logger.info("stopped")
    return leave(0)


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


class LoadingBar:
    """Told of bytes as they are loaded; drawn on a terminal, logged in quarters elsewhere."""

    def __init__(self, progress: Progress, *, drawn: bool) -> None:
        self._progress = progress
        self._task = progress.add_task("loading weights", total=None, visible=False)
        self._drawn = drawn
        self._logged_quarters = 0

    def report(self, done_bytes: int, total_bytes: int) -> None:
        if not self._drawn:
            self._log(done_bytes, total_bytes)
            return
        self._progress.update(self._task, completed=done_bytes, total=total_bytes, visible=True)
        if not self._progress.live.is_started:
            self._progress.start()
        if done_bytes >= total_bytes:
            self.finish()

    def _log(self, done_bytes: int, total_bytes: int) -> None:
        quarters = 4 * done_bytes // max(1, total_bytes)
        if quarters > self._logged_quarters:
            self._logged_quarters = quarters
            logger.info("loading weights", percent=25 * quarters, of=format_bytes(total_bytes))

    def finish(self) -> None:
        self._progress.stop()


@contextmanager
def loading_bar() -> Iterator[LoadingBar]:
    """A progress bar on standard error that appears with its first report."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar = LoadingBar(progress, drawn=console.is_terminal)
    try:
        yield bar
    finally:
        bar.finish()


def _banner(
    pipeline: InferencePipeline, listener: socket.socket, new_token: str | None, token_file: Path | None
) -> str:
    """What to know to use the server. A token that was generated just now is shown, this once."""
    from core.views.status import device_views

    settings, model = pipeline.settings, pipeline.model
    host, port = listener.getsockname()[:2]
    shown_host = f"[{host}]" if ":" in host else host
    url = f"http://{shown_host}:{port}"
    views = device_views(pipeline.current_engine)
    devices = ", ".join(f"{view.name} ({format_bytes(view.limit_bytes)})" for view in views)
    if token_file is None:
        token, value = "the one in VRM_API_TOKEN or api.token", "$VRM_API_TOKEN"
    else:
        token, value = f"kept in {token_file}", f"$(cat '{token_file}')"
        if new_token is not None:
            token = f"{new_token} (generated, shown only now; {token})"
    rows = {
        "API": f"{url}/v1",
        "model": ", ".join((model.name, *model.aliases)),
        "devices": devices,
        "token": token,
        "metrics": f"http://{shown_host}:{settings.api.metrics_port}/metrics" if settings.api.metrics_port else "off",
    }
    lines = [f"VRAMancer {__version__} is ready", *(f"  {name:8} {text}" for name, text in rows.items())]
    lines += [
        "  try it   " + f'curl {url}/v1/completions -H "Authorization: Bearer {value}" '
        "-H 'Content-Type: application/json' "
        f'-d \'{{"model": "{model.name}", "prompt": "Once upon a time", "max_tokens": 32}}\'',
    ]
    return "\n".join(lines)
