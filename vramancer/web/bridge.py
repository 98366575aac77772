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
from vramancer.web.answer import Answer, ClientGoneError
from vramancer.web.environ import wsgi_environ
from vramancer.web.limits import Limits

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

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
    """The ASGI application. `admit` looks at a request's head; it raises nothing and is quick."""

    def __init__(self, app: WSGIApplication, admit: Callable[[WSGIEnvironment], Admission], limits: Limits) -> None:
        self._app = app
        self._admit = admit
        self._limits = limits
        self._quick = ThreadPoolExecutor(QUICK_THREADS, "quick")
        self._slow = ThreadPoolExecutor(limits.max_waiting + RESERVED, "request")
        self._num_slow = 0
        self._body_bytes = 0
        self._draining: asyncio.Event = asyncio.Event()
        self.num_open = 0

    def drain(self) -> None:
        """Refuse from now on what is not public. Loop thread only."""
        self._draining.set()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        environ = wsgi_environ(scope)
        admission = self._admit(environ)
        self.num_open += 1
        try:
            await self._serve(environ, admission, receive, send, scope["extensions"]["vramancer"]["abort"])
        finally:
            self.num_open -= 1

    async def _serve(
        self, environ: WSGIEnvironment, admission: Admission, receive: Receive, send: Send, abort: Callable[[], None]
    ) -> None:
        takes_slot = admission.granted and admission.waits
        held = 0
        refusal = self._no_room(admission)
        if refusal is not None:
            takes_slot = False
        self._num_slow += takes_slot
        try:
            if refusal is None and admission.granted:
                try:
                    held = await self._read_body(environ, receive)
                except VRAMancerError as error:
                    refusal = error
                except ClientGoneError:
                    return
            if refusal is not None:
                environ[REFUSAL_KEY] = refusal
            answer = Answer(asyncio.get_running_loop())
            environ[DISCONNECTED_KEY] = answer.is_gone
            environ[STOPPING_KEY] = self._draining.is_set()
            pool = self._slow if takes_slot and refusal is None else self._quick
            work = pool.submit(self._run, environ, answer)
            asks_first = refusal is not None or not admission.granted  # to receive would ask for the body
            await _deliver(answer, None if asks_first and "HTTP_EXPECT" in environ else receive, send, abort)
            await asyncio.wrap_future(work)
        finally:
            self._num_slow -= takes_slot
            self._body_bytes -= held

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
        except BaseException as error:
            log.error("request failed unexpectedly", error=repr(error), exc_info=error)
            answer.fail(json.dumps(FAILED.to_openai()).encode())

    def close(self) -> None:
        """No more requests. Threads end with what they do."""
        self._quick.shutdown(wait=False, cancel_futures=True)
        self._slow.shutdown(wait=False, cancel_futures=True)


async def _deliver(answer: Answer, receive: Receive | None, send: Send, abort: Callable[[], None]) -> None:
    """Send the answer as it comes, and tell its thread when nobody is there any more."""
    watch = asyncio.ensure_future(_watch(answer, receive)) if receive is not None else None
    try:
        while (messages := await answer.messages()) is not None:
            for message in messages:
                await send(message)
        if answer.failed:
            abort()
    finally:
        answer.leave()
        if watch is not None:
            watch.cancel()


async def _watch(answer: Answer, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # the end of an empty body, or what a refused one still sends
    answer.leave()


def _stopping() -> UnavailableError:
    return UnavailableError("The server is stopping.", code="stopping", retry_after_s=10.0)


def _too_slow(seconds: float) -> RequestTimeoutError:
    return RequestTimeoutError(f"The body did not come within the {seconds:g} seconds that this server waits for one.")
