"""One request to one replica: its answer as a whole or as events, checked, with the model's name put back."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from core.errors import QueueFullError, UpstreamError, UpstreamTimeoutError, UpstreamUnavailableError, VRAMancerError
from core.upstreams.prompt import Prompt
from core.upstreams.replica import Replica
from core.upstreams.sse import DONE, EventReader
from core.upstreams.transport import END, Exchange, Head, Timeouts, Transport

POLL_INTERVAL_S = 0.25
"""How soon whoever waits may look whether its client is still there."""
MAX_REFUSAL_BYTES = 1 << 20
MAX_SHOWN = 500
HOPS_HEADER = "X-VRAMancer-Hops"
MAX_HOPS = 3
"""VRAMancers that may pass a request on: a circle of them ends."""
PASSED_ON = frozenset({400, 404, 405, 409, 413, 414, 415, 422, 451, 501})
"""What these say is about the request, so it is the client's to know."""
NOT_ALLOWED = frozenset({401, 402, 403, 407})


@dataclass(frozen=True, slots=True)
class Job:
    """A request as it came: route below `/v1`, body, and what travels with it. `deadline_s` is on the monotonic
    clock."""

    route: str
    body: Mapping[str, Any]
    prompt: Prompt
    request_id: str
    hops: int
    deadline_s: float
    max_answer_bytes: int
    timeouts: Timeouts

    @property
    def name(self) -> str:
        """What the client calls the model."""
        return str(self.body["model"])


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, JSON."""

    status: int
    body: bytes


class PassedOn(Exception):
    """The upstream says that the request is wrong; that is the answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"status {answer.status}")
        self.answer = answer


class Call:
    """Counted at its replica from `__init__` to `close`, which has to follow.

    Raises, when it is made, `UpstreamUnavailableError`; then, from `whole` and `events`, `UpstreamError`,
    `QueueFullError`, `UpstreamUnavailableError` and `PassedOn`.
    """

    def __init__(self, replica: Replica, transport: Transport, job: Job, cached_tokens: int) -> None:
        self._replica = replica
        self._job = job
        self._fresh = max(1, job.prompt.tokens - cached_tokens)
        self._began_s = time.monotonic()
        self._outcome, self._computed, self._read_all = "aborted", False, False
        self._error: str | None = None
        self._exchange: Exchange | None = None
        replica.enter(job.prompt)
        try:
            body = msgspec.json.encode({**job.body, "model": replica.model or job.name})
            self._exchange = transport.open(
                "POST", f"{replica.base_url}/{job.route}", headers=self._headers(), body=body, timeouts=job.timeouts
            )
        except Exception as error:
            self._failed(error)
            self.close()
            raise

    def _headers(self) -> dict[str, str]:
        job = self._job
        return {
            "Content-Type": "application/json",
            "Accept": "text/event-stream" if job.body.get("stream") else "application/json",
            "X-Request-ID": job.request_id,
            HOPS_HEADER: str(job.hops + 1),
            **self._replica.headers,
        }

    def whole(self) -> Iterator[Answer | None]:
        """None whenever there is nothing yet, then the answer."""
        try:
            head = yield from self._head()
            data = yield from self._body(self._job.max_answer_bytes)
            self._saw_first()
            if head.media_type != "application/json":
                raise self._garbage(f"an answer of type {head.media_type or 'unknown'}")
            answer = Answer(head.status, self._renamed(data)[0])
        except Exception as error:
            self._failed(error)
            raise
        self._outcome, self._read_all = "ok", True
        yield answer

    def events(self) -> Iterator[tuple[bytes, dict[str, Any]] | None]:
        """None whenever there is nothing yet; events, as text and as what it says; ends behind `[DONE]`."""
        try:
            head = yield from self._head()
            if head.media_type != "text/event-stream":
                raise self._garbage(f"an answer of type {head.media_type or 'unknown'} instead of a stream")
            yield from self._stream()
        except GeneratorExit:
            raise
        except Exception as error:
            self._failed(error)
            raise
        self._outcome = "ok"

    def _stream(self) -> Iterator[tuple[bytes, dict[str, Any]] | None]:
        reader, last_s, ended = EventReader(), None, False
        while (piece := self._next()) is not END:
            if piece is None:
                yield None
                continue
            for data in reader.feed(piece):
                now_s = time.monotonic()
                if last_s is None:
                    self._saw_first()
                else:
                    self._replica.saw_next(now_s - last_s)
                last_s = now_s
                if data.strip() == DONE:
                    self._read_all = True
                    return
                text, values = self._renamed(data)
                if "error" in values and values["error"] is not None:
                    raise UpstreamError(f"{self._where} failed: {_said(values)}", code="upstream_failed")
                ended = ended or _finishes(values)
                yield text, values
        if not ended:
            raise UpstreamError(f"{self._where} ended its answer before it was complete.", code="upstream_lost")
        self._read_all = True

    def close(self) -> None:
        """End it and count it. Safe to call twice."""
        if self._outcome == "":
            return
        if self._exchange is not None:
            self._exchange.close(rest=self._read_all)
        self._replica.leave(self._job.prompt, self._outcome, self._error, computed=self._computed)
        self._outcome = ""

    # -- what comes ---------------------------------------------------------------------------------------------------

    @property
    def _where(self) -> str:
        return f"The upstream of {self._job.name}"

    def _next(self) -> Any:
        """A head, a piece, `END`, or None. Raises `UpstreamError`."""
        left_s = self._job.deadline_s - time.monotonic()
        if left_s <= 0:
            raise UpstreamTimeoutError(f"{self._where} has not ended its answer in time.")
        assert self._exchange is not None
        return self._exchange.next(min(POLL_INTERVAL_S, left_s))

    def _head(self) -> Generator[None, None, Head]:
        while (head := self._next()) is None:
            yield None
        assert isinstance(head, Head)
        if head.headers.get("content-encoding", "identity").lower() != "identity":
            raise self._garbage("a compressed answer, which was not asked for")
        if head.status != 200:
            yield from self._refusal(head)
        return head

    def _body(self, most: int) -> Generator[None, None, bytes]:
        pieces, held = [], 0
        while (piece := self._next()) is not END:
            if piece is not None:
                pieces.append(piece)
                held += len(piece)
                if held > most:
                    raise UpstreamError(
                        f"{self._where} sent an answer of more than {most} bytes.", code="upstream_too_large"
                    )
            yield None
        return b"".join(pieces)

    def _refusal(self, head: Head) -> Generator[None, None, None]:
        """Raise what a status other than 200 means."""
        status = head.status
        if 300 <= status < 400:
            raise UpstreamError(
                f"{self._where} redirects (status {status}), which is not followed; its url has to be the final one.",
                code="upstream_redirect",
            )
        if status in NOT_ALLOWED:
            raise UpstreamError(
                f"{self._where} refuses this server (status {status}); its api_key may be wrong.",
                code="upstream_refused",
            )
        data = yield from self._body(MAX_REFUSAL_BYTES)
        try:
            values = msgspec.json.decode(data)
        except (msgspec.DecodeError, RecursionError):
            values = None
        said = _said(values)
        if status in PASSED_ON:
            self._outcome, self._read_all = "refused", True
            if not isinstance(values, dict):
                values = {"error": {"message": said or f"status {status}", "type": "invalid_request_error",
                                    "param": None, "code": "upstream_refused_request"}}  # fmt: skip
            raise PassedOn(Answer(status, msgspec.json.encode(values)))
        wait_s = _seconds(head.headers.get("retry-after"))
        if status == 429:
            raise QueueFullError(f"{self._where} is busy: {said}", retry_after_s=wait_s or 1.0)
        if status == 503:
            raise UpstreamUnavailableError(f"{self._where} is not available: {said}", retry_after_s=wait_s or 5.0)
        raise UpstreamError(f"{self._where} failed with status {status}: {said}", code="upstream_failed")

    def _renamed(self, data: bytes) -> tuple[bytes, dict[str, Any]]:
        """The JSON object in `data`, with the model called as the client does; bytes stay as they are otherwise."""
        try:
            values = msgspec.json.decode(data)
        except (msgspec.DecodeError, RecursionError):
            raise self._garbage("an answer that is not JSON") from None
        if not isinstance(values, dict):
            raise self._garbage("JSON that is no object")
        if "model" in values and values["model"] != self._job.name:
            values["model"] = self._job.name
            data = msgspec.json.encode(values)
        return data, values

    def _garbage(self, what: str) -> UpstreamError:
        return UpstreamError(f"{self._where} sent {what}.", code="upstream_bad_answer")

    def _saw_first(self) -> None:
        self._computed = True
        self._replica.saw_first(self._job.prompt, self._fresh, time.monotonic() - self._began_s)

    def _failed(self, error: Exception) -> None:
        if isinstance(error, PassedOn):
            return
        self._outcome = "error"
        if not isinstance(error, QueueFullError):  # which says that it works
            self._error = error.message if isinstance(error, VRAMancerError) else repr(error)


def _finishes(values: Mapping[str, Any]) -> bool:
    choices = values.get("choices")
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") is not None for choice in choices
    )


def _said(values: Any) -> str:
    """The message of an error in any of the usual shapes, shortened."""
    found = values
    for name in ("error", "detail", "message"):
        if isinstance(found, dict) and found.get(name) is not None:
            found = found[name]
    text = found if isinstance(found, str) else msgspec.json.encode(found).decode() if found is not None else ""
    return "".join(letter if letter.isprintable() else " " for letter in text[:MAX_SHOWN])


def _seconds(text: str | None) -> float | None:
    """Of a `Retry-After` that gives seconds."""
    return float(min(int(text), 3600)) if text is not None and text.isascii() and text.isdigit() else None
