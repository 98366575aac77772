"""From ASGI to WSGI: bodies are read and answers are written by the event loop, threads only compute.

A request is let in by its head alone. If it may not go on (no token, no route, too much under way, the server is
stopping), the application answers it without its body. Else the body is read, in full and within its time, before a
thread takes it. What is quick has threads of its own, so that it never waits for what takes long.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from core.errors import QueueFullError, RequestTimeoutError, UnavailableError, VRAMancerError
from core.logs import get_logger
from core.security.admission import DISCONNECTED_KEY, REFUSAL_KEY, STOPPING_KEY, Admission
from vramancer.web.answer import REST, Answer, ClientGoneError
from vramancer.web.environ import wsgi_environ
from vramancer.web.limits import Limits
from vramancer.web.live import Live, LiveMount

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

    from vramancer.web.protocol import GuardedProtocol

log = get_logger(__name__)

QUICK_THREADS = 2
"""Each thread that runs Python takes its share of the interpreter from the engine: a flood of small requests has so
many shares."""
RESERVED = 8
"""Threads for management, however many requests are under way."""
BODIES_HELD = 16
"""So many bodies of the largest size may be held in memory at a time."""
RETRY_AFTER_S = 1.0
FAILED = VRAMancerError("The server failed; the cause is in its log.", code="internal_error")

Receive = Callable[[], Any]
Send = Callable[[dict[str, Any]], Any]


class Bridge:
    """The ASGI application. `admit` looks at a request's head; it raises nothing and is quick. `live` answers what is
    below its path, in the event loop."""

    def __init__(
        self,
        app: WSGIApplication,
        admit: Callable[[WSGIEnvironment], Admission],
        limits: Limits,
        live: Live | None = None,
    ) -> None:
        self._app = app
        self._admit = admit
        self._limits = limits
        self._quick = ThreadPoolExecutor(QUICK_THREADS, "quick")
        self._slow = ThreadPoolExecutor(limits.max_waiting + RESERVED, "request")
        self._num_slow = 0
        self._body_bytes = 0
        self._draining: asyncio.Event = asyncio.Event()
        self._live = LiveMount(live, limits.body_timeout_s) if live is not None else None
        self.num_open = 0

    def drain(self) -> None:
        """Refuse from now on what is not public; who watches is let go. Loop thread only."""
        self._draining.set()
        if self._live is not None:
            self._live.close(_stopping())

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        environ = wsgi_environ(scope)
        if self._live is not None and self._live.answers(scope["path"]):
            await self._live(scope, environ, receive, send)
            return
        admission = self._admit(environ)
        connection: GuardedProtocol = scope["extensions"]["vramancer"]["connection"]
        held = 0
        self.num_open += 1
        try:
            refusal = self._no_room(admission)
            if refusal is None and admission.granted and not admission.public:  # nothing public takes a body
                held = await self._read_body(environ, receive)
                refusal = self._no_room(admission)
            await self._answer(environ, admission, refusal, send, connection)
        except VRAMancerError as error:
            await self._answer(environ, admission, error, send, connection)
        except ClientGoneError:
            pass
        finally:
            self.num_open -= 1
            self._body_bytes -= held

    async def _answer(
        self,
        environ: WSGIEnvironment,
        admission: Admission,
        refusal: VRAMancerError | None,
        send: Send,
        connection: GuardedProtocol,
    ) -> None:
        """Have a thread run the application, and send what it answers."""
        is_slow = admission.granted and admission.waits and refusal is None
        answer = Answer(asyncio.get_running_loop(), connection.write_now, may_wait=is_slow)
        connection.on_lost = answer.leave
        if connection.transport.is_closing():
            return
        environ[DISCONNECTED_KEY] = answer.is_gone
        environ[STOPPING_KEY] = self._draining.is_set()
        if refusal is not None:
            environ[REFUSAL_KEY] = refusal
        self._num_slow += is_slow
        try:
            work = (self._slow if is_slow else self._quick).submit(self._run, environ, answer)
            await _deliver(answer, send, connection)
            await asyncio.wrap_future(work)
        finally:
            if connection.on_lost == answer.leave:  # the connection's next request may have come meanwhile
                connection.on_lost = None
            self._num_slow -= is_slow

    def _no_room(self, admission: Admission) -> VRAMancerError | None:
        if admission.public:
            return None
        if self._draining.is_set():
            return _stopping()
        most = self._limits.max_waiting + (RESERVED if admission.manages else 0)
        if admission.granted and admission.waits and self._num_slow >= most:
            return QueueFullError(
                f"{self._num_slow} requests are under way, as many as this server takes at a time; try again later.",
                retry_after_s=RETRY_AFTER_S,
            )
        return None

    async def _read_body(self, environ: WSGIEnvironment, receive: Receive) -> int:
        """Put the body into `environ`; returns the bytes that it holds. One that is announced as too long is left to
        the application, which refuses it.

        Raises:
            RequestTimeoutError: it did not come in time.
            UnavailableError: the server is stopping, or holds too many bodies.
            ClientGoneError: the client left.
        """
        limit = self._limits.max_body_bytes
        announced = environ.get("CONTENT_LENGTH")
        if announced == "0" or (announced is None and "HTTP_TRANSFER_ENCODING" not in environ):
            return 0
        if announced is not None and int(announced) > limit:
            return 0
        reading = asyncio.ensure_future(self._receive_body(receive, limit))
        stopping = asyncio.ensure_future(self._draining.wait())
        try:
            done, _ = await asyncio.wait(
                (reading, stopping), timeout=self._limits.body_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if reading not in done:
                raise _stopping() if stopping in done else _too_slow(self._limits.body_timeout_s)
            body = reading.result()
        finally:
            stopping.cancel()
            if not reading.done():
                reading.cancel()
        environ["wsgi.input"] = io.BytesIO(body)
        return len(body)

    async def _receive_body(self, receive: Receive, limit: int) -> bytes:
        """The whole body, or one byte more than `limit`."""
        pieces: list[bytes] = []
        held = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                piece = message["body"][: limit + 1 - held]
                held += len(piece)
                self._body_bytes += len(piece)
                if self._body_bytes > BODIES_HELD * limit:
                    raise UnavailableError("The server holds too many request bodies.", retry_after_s=RETRY_AFTER_S)
                pieces.append(piece)
                if not message["more_body"] or held > limit:
                    return b"".join(pieces)
        except BaseException:
            self._body_bytes -= held
            raise

    def _run(self, environ: WSGIEnvironment, answer: Answer) -> None:
        """The application's work, in a thread. Whatever it raises ends this request alone."""
        try:
            pieces: Iterable[bytes] = self._app(environ, answer.start)
            try:
                for piece in pieces:
                    answer.write(piece)
            finally:
                close = getattr(pieces, "close", None)
                if close is not None:
                    close()
            answer.finish()
        except ClientGoneError:
            pass
        except BaseException as error:  # a panic of a Rust library, for one, is no `Exception`
            log.error("request failed unexpectedly", error=repr(error), exc_info=error)
            answer.fail(json.dumps(FAILED.to_openai()).encode())

    def close(self) -> None:
        """No more requests. Threads end with what they do, those that look at the server for viewers before this."""
        self._quick.shutdown(wait=False, cancel_futures=True)
        self._slow.shutdown(wait=False, cancel_futures=True)
        if self._live is not None:
            self._live.end()


async def _deliver(answer: Answer, send: Send, connection: GuardedProtocol) -> None:
    """Send the answer as it comes."""
    try:
        while (messages := await answer.messages()) is not None:
            for message in messages:
                if message["type"] == REST:
                    connection.write_rest(message["body"])
                else:
                    await send(message)
        if answer.failed:
            connection.transport.abort()
    finally:
        answer.leave()


def _stopping() -> UnavailableError:
    return UnavailableError("The server is stopping.", code="stopping", retry_after_s=10.0)


def _too_slow(seconds: float) -> RequestTimeoutError:
    return RequestTimeoutError(f"The body did not come within the {seconds:g} seconds that this server waits for one.")
