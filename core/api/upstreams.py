"""Requests for models that other servers answer for: `answered` sends them there, and all others to our own engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TypeVar

from flask import Response, g, request

from core.api.body import read_body, to_json
from core.api.context import api_context, current_span
from core.api.errors import ClientDisconnectedError
from core.api.generation import DONE, HEADERS, KEEP_ALIVE
from core.errors import StepFailedError, UpstreamError, VRAMancerError
from core.logs import get_logger
from core.security.admission import DISCONNECTED_KEY
from core.upstreams.call import HOPS_HEADER, MAX_HOPS, POLL_INTERVAL_S, Answer, Job, PassedOn
from core.upstreams.group import Group
from core.upstreams.prompt import Prompt, read_prompt
from core.upstreams.relay import ELSEWHERE, Relay
from core.upstreams.replica import Replica
from core.upstreams.stub import STUB_HEADER, stub_answer, stub_events

log = get_logger(__name__)

T = TypeVar("T")


def answered(route: str, here: Callable[[], Response]) -> Response:
    """The answer to the current request, whose route below `/v1` this is: that of another server if the body names its
    model, else what `here` makes. Such a request never reaches our engine, unless our model is a replica.

    Raises:
        UpstreamError, UpstreamUnavailableError, QueueFullError: nobody who answers for the model can do so now.
    """
    pipeline = api_context().pipeline
    group = pipeline.upstreams.find(read_body().get("model"))
    if group is not None:
        return _relayed(group, route, here)
    if stub_answers():
        return _stub(route)
    return here()


def _relayed(group: Group, route: str, here: Callable[[], Response]) -> Response:
    upstreams, body = api_context().pipeline.upstreams, read_body()
    span = current_span()
    if span is not None:
        span.set(gen_ai__request__model=group.name)
    job = Job(
        route, body, read_prompt(body), g.request_id, _hops(), time.monotonic() + upstreams.settings.total_timeout_s,
        upstreams.settings.max_answer_bytes, upstreams.timeouts,
    )  # fmt: skip
    relay = upstreams.relay(group, job)
    while (found := relay.next_replica()) is not None:
        replica, cached_tokens = found
        try:
            if replica.is_self:
                return _own(replica, job.prompt, here)
            if body.get("stream") is True:
                return _streamed(relay, replica, cached_tokens)
            answer = _awaited(relay.whole(replica, cached_tokens))
            return Response(answer.body, status=answer.status, mimetype="application/json")
        except PassedOn as passed:
            return Response(passed.answer.body, status=passed.answer.status, mimetype="application/json")
        except (*ELSEWHERE, StepFailedError) as error:
            relay.failed(replica, error)
    raise relay.failure or UpstreamError(f"Nobody answers for {group.name}.")


def _hops() -> int:
    """How many VRAMancers have passed the request on."""
    text = request.headers.get(HOPS_HEADER, "0")
    hops = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else MAX_HOPS
    if hops >= MAX_HOPS:
        raise UpstreamError(
            f"The request was passed on {MAX_HOPS} times; the servers' upstreams probably form a circle.",
            code="upstream_loop",
        )
    return hops


def _own(replica: Replica, prompt: Prompt, here: Callable[[], Response]) -> Response:
    """By the model that is loaded here."""
    replica.enter(prompt)
    outcome, trouble = "aborted", None

    def leave() -> None:
        replica.leave(prompt, outcome, trouble, computed=False)

    try:
        response = here()
        outcome = "ok"
    except (*ELSEWHERE, StepFailedError) as error:
        outcome, trouble = "error", error.message
        raise
    except VRAMancerError:
        outcome = "refused"
        raise
    finally:
        if outcome != "ok":
            leave()
    if response.is_streamed:
        response.call_on_close(leave)
    else:
        leave()
    return response


def _looking(steps: Iterator[T]) -> Iterator[T]:
    """The same, as long as the client is there. Raises `ClientDisconnectedError`."""
    is_gone = request.environ.get(DISCONNECTED_KEY, _never)
    return _while_there(steps, is_gone)


def _never() -> bool:
    """A server that cannot tell."""
    return False


def _while_there(steps: Iterator[T], is_gone: Callable[[], bool]) -> Iterator[T]:
    looked_s = time.monotonic()
    for step in steps:
        if time.monotonic() - looked_s >= POLL_INTERVAL_S:
            looked_s = time.monotonic()
            if is_gone():
                raise ClientDisconnectedError
        yield step


def _awaited(steps: Iterator[Answer | None]) -> Answer:
    try:
        return next(step for step in _looking(steps) if step is not None)
    finally:
        _close(steps)


def _close(steps: Iterator[object]) -> None:
    close = getattr(steps, "close", None)
    if close is not None:
        close()


def _streamed(relay: Relay, replica: Replica, cached_tokens: int) -> Response:
    """The stream is opened by its first event, so that what fails before has a status of its own; or after so long a
    silence that a comment has to keep the client waiting."""
    keepalive_s = api_context().pipeline.settings.api.keepalive_comment_s
    source = relay.events(replica, cached_tokens)
    events, until_s, first = _looking(source), time.monotonic() + keepalive_s, None
    try:
        for first in events:
            if first is not None or time.monotonic() >= until_s:
                break
    except BaseException:
        _close(source)
        raise
    response = Response(_written(chain([first], events), source, keepalive_s), mimetype="text/event-stream")
    response.headers.update(HEADERS)
    response.call_on_close(lambda: _close(source))
    return response


def _written(events: Iterator[bytes | None], source: Iterator[bytes | None], keepalive_s: float) -> Iterator[bytes]:
    wrote_s = time.monotonic() - keepalive_s  # silence in front of the first event has lasted that long
    try:
        for event in events:
            if event is not None:
                yield b"data: " + event + b"\n\n"
            elif time.monotonic() - wrote_s >= keepalive_s:
                yield KEEP_ALIVE.encode()
            else:
                continue
            wrote_s = time.monotonic()
        yield DONE.encode()
    except ClientDisconnectedError:
        log.info("client left its stream")
    except PassedOn as passed:
        yield b"data: " + passed.answer.body + b"\n\n"
    except VRAMancerError as error:
        log.error("stream failed", error=error.message, code=error.error_code)
        yield f"data: {to_json(error.to_openai())}\n\n".encode()
    finally:
        _close(source)


# -- the stub ----------------------------------------------------------------------------------------------------------


def stub_answers() -> bool:
    """Whether there is no model at all, and the stub is allowed."""
    pipeline = api_context().pipeline
    return (
        pipeline.settings.backend.allow_stub
        and not pipeline.upstreams.named
        and pipeline.current_engine is None
        and not pipeline.loading
    )


def _stub(route: str) -> Response:
    if read_body().get("stream") is True:
        events = stub_events(route)
        pieces = [f"data: {to_json(event)}\n\n".encode() for event in events]
        response = Response([*pieces, DONE.encode()], mimetype="text/event-stream")
    else:
        answer = stub_answer(route)
        response = Response(to_json(answer) + "\n", mimetype="application/json")
    response.headers[STUB_HEADER] = "1"
    return response
