"""A finished request as spans: `queue`, `prefill` and `decode`, and below the last two what each stage did.

The engine thread only leaves the request here; a thread of its own makes the spans.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from opentelemetry.trace import Span, StatusCode, Tracer

from core.logs import get_logger
from core.request import FinishedRequest, TraceContext
from core.tracing.spans import below, context_of, unix_ns

log = get_logger(__name__)

MAX_WAITING = 4096
"""Requests whose spans are not made yet; further ones are left out."""
CLOSE_S = 5.0


class _Phase(NamedTuple):
    name: str
    began_s: float
    ended_s: float


def phases(request: FinishedRequest) -> Iterator[_Phase]:
    """Those that the request came to, in order; the last ends with it."""
    times = [request.submitted_s]
    for began_s in (request.started_s, request.first_token_s):
        if began_s is None:
            break
        times.append(began_s)
    ends = [*times[1:], request.ended_s]
    yield from map(_Phase, ("queue", "prefill", "decode"), times, ends)


class RequestSpans:
    """An observer of the batcher: see `core.batching.publisher.RequestObserver`."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._requests: queue.Queue[FinishedRequest | None] = queue.Queue(MAX_WAITING)
        self._left_out = 0
        self._thread = threading.Thread(target=self._work, name="vrm-traces", daemon=True)
        self._thread.start()

    def observe_finished(self, request: FinishedRequest) -> None:
        """Engine thread."""
        if request.trace is None:
            return
        try:
            self._requests.put_nowait(request)
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        """Make the spans of what has ended, as far as that is done within `CLOSE_S`. Safe to call twice."""
        if self._thread.is_alive():
            with suppress(queue.Full):
                self._requests.put(None, timeout=CLOSE_S)
            self._thread.join(CLOSE_S)

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            try:
                self._make(request)
            except Exception as error:  # a trace less, and not the thread that makes all others
                log.error("a request's spans could not be made", request=request.request_id, exc_info=error)
            if self._left_out and self._requests.empty():
                log.warning("requests ended faster than their spans could be made", left_out=self._left_out)
                self._left_out = 0

    def _make(self, request: FinishedRequest) -> None:
        trace = request.trace
        assert trace is not None
        found = list(phases(request))
        for phase in found:
            span = self._begin(trace, trace, phase)
            span.set_attribute("vramancer.request.id", request.request_id)
            _describe(span, phase.name, request)
            if phase is found[-1]:
                _conclude(span, request)
            inner = context_of(span, trace.epoch_ns)
            for work in request.work:
                if work.phase == phase.name:
                    stage = self._begin(trace, inner, phase._replace(name=f"stage {work.stage}"))
                    stage.set_attribute("vramancer.stage.name", work.stage)
                    stage.set_attribute("vramancer.stage.steps", work.steps)
                    stage.set_attribute("vramancer.stage.busy_seconds", work.busy_s)
                    stage.end(unix_ns(trace, phase.ended_s))
            span.end(unix_ns(trace, phase.ended_s))

    def _begin(self, clock: TraceContext, parent: TraceContext, phase: _Phase) -> Span:
        return self._tracer.start_span(phase.name, below(parent), start_time=unix_ns(clock, phase.began_s))


def _describe(span: Span, phase: str, request: FinishedRequest) -> None:
    if phase == "prefill":
        span.set_attribute("gen_ai.usage.input_tokens", request.prompt_tokens)
        span.set_attribute("gen_ai.usage.cache_read.input_tokens", request.cached_tokens)
    elif phase == "decode":
        span.set_attribute("gen_ai.usage.output_tokens", request.output_tokens)


def _conclude(span: Span, request: FinishedRequest) -> None:
    """The phase in which the request ended."""
    span.set_attribute("vramancer.request.finish_reason", request.reason)
    span.set_attribute("vramancer.request.preemptions", request.preemptions)
    if request.reason == "error":
        span.set_status(StatusCode.ERROR)
