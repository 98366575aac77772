"""Runs the WSGI application: gunicorn's threaded worker, or Werkzeug's server on Windows and for development.

gunicorn normally forks workers from a parent. The model lives in one process and its threads would not survive a
fork, so its worker runs here in the main thread, with no parent: nothing forks, errors at start-up are exceptions,
and the socket starts listening only when the model is there to answer.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any

from core.config import ApiSettings
from core.errors import ConfigError
from core.logs import get_logger

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = get_logger(__name__)

_BACKLOG = 1024
_KEEPALIVE_S = 30
_INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


def bind_socket(host: str, port: int) -> socket.socket:
    """A TCP socket bound to the address and not yet listening; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"api.host: {host!r} is not an address of this machine: {error.strerror}.") from error
    listener = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":  # there it would let two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _address_error(host, port, error) from error
    return listener


def listen(listener: socket.socket) -> None:
    """Start to accept connections on a bound socket. Raises `ConfigError` if another program was faster."""
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _address_error(host, port, error) from error


def _address_error(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"api.port: {host}:{port} is in use by another program; choose another with --port.")
    return ConfigError(f"api.host: cannot listen on {host}:{port}: {error.strerror}.")


def run_until_stopped(
    app: WSGIApplication, listener: socket.socket, settings: ApiSettings, on_ready: Callable[[], None]
) -> None:
    """Answer requests on a listening socket until Ctrl-C or SIGTERM, then let running ones finish.

    Returns once they have, or after `drain_timeout_s`. A second signal ends the process at once. `on_ready` is called
    when signals are handled. Main thread only.
    """
    if sys.platform == "win32" or settings.server == "werkzeug":
        _run_werkzeug(app, listener, settings, on_ready)
    else:
        _run_gunicorn(app, listener, settings, on_ready)


def _on_stop_signals(stop: Callable[[], None], drain_timeout_s: float) -> None:
    """From now on the first SIGINT or SIGTERM calls `stop`, the second exits."""
    note = f"\nstopping: running requests get {drain_timeout_s:g} s; once more to exit at once\n".encode()
    stopping = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            os._exit(_INTERRUPTED)
        stopping = True
        os.write(2, note)  # unbuffered: a signal may come in the middle of a print
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def _run_gunicorn(
    app: WSGIApplication, listener: socket.socket, settings: ApiSettings, on_ready: Callable[[], None]
) -> None:
    from gunicorn.config import Config
    from gunicorn.glogging import Logger
    from gunicorn.workers.gthread import ThreadWorker

    class PropagatingLogger(Logger):  # type: ignore[misc]
        """gunicorn's messages go where all others go; the API logs requests itself."""

        def setup(self, cfg: Config) -> None:
            self._access_log_enabled = False
            self.error_log.propagate = True

    class Worker(ThreadWorker):  # type: ignore[misc]
        """The threaded worker without a parent process."""

        def init_signals(self) -> None:
            _on_stop_signals(lambda: self.handle_exit(signal.SIGTERM, None), settings.drain_timeout_s)
            on_ready()

        def is_parent_alive(self) -> bool:
            return True

    class Application:
        def wsgi(self) -> WSGIApplication:
            return app

    config = Config()
    config.set("threads", settings.threads)
    config.set("keepalive", _KEEPALIVE_S)
    config.set("graceful_timeout", math.ceil(settings.drain_timeout_s))
    config.set("loglevel", "warning")
    Worker(0, os.getppid(), [listener], Application(), 0, config, PropagatingLogger(config)).init_process()


def _run_werkzeug(
    app: WSGIApplication, listener: socket.socket, settings: ApiSettings, on_ready: Callable[[], None]
) -> None:
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_request(self, *args: Any, **kwargs: Any) -> None:
            """The API logs requests itself."""

    counted = _InFlight(app)
    host, port = listener.getsockname()[:2]
    server = make_server(host, port, counted, threaded=True, request_handler=Handler, fd=listener.fileno())
    # `shutdown` waits for the loop that the signal has interrupted, so it needs a thread of its own.
    stop = threading.Thread(target=server.shutdown, name="stop", daemon=True)
    _on_stop_signals(stop.start, settings.drain_timeout_s)
    on_ready()
    server.serve_forever()
    server.server_close()
    listener.close()
    counted.wait(settings.drain_timeout_s)


class _InFlight:
    """WSGI middleware that counts answers from their first to their last byte."""

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app
        self._count = 0
        self._changed = threading.Condition()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        from werkzeug.wsgi import ClosingIterator

        self._add(1)
        try:
            return ClosingIterator(self._app(environ, start_response), lambda: self._add(-1))
        except BaseException:
            self._add(-1)
            raise

    def _add(self, change: int) -> None:
        with self._changed:
            self._count += change
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Whether no answer is under way any more, after at most `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count == 0, timeout_s)


def leave(status: int, grace_s: float = 2.0) -> int:
    """`status`, for the program to return; ends the process here if threads are stuck after `grace_s`.

    A thread that reads from a client which sends nothing would keep the interpreter from ending.
    """
    deadline_s = time.monotonic() + grace_s
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline_s - time.monotonic()))
            if thread.is_alive():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
    return status
