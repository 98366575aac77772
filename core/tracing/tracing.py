"""`Tracing`: the spans of one pipeline, and where they go."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.trace import SpanKind, StatusCode

from core.config import TracingSettings
from core.metrics.tasks import Task
from core.tracing.exporter import Export
from core.tracing.requests import RequestSpans
from core.tracing.server import Attribute, ServerSpan
from core.tracing.spans import UNRECORDED, below, below_caller, context_of, current, epoch_ns, unix_ns
from core.tracing.w3c import read_caller

SCOPE = "vramancer"


class Tracing:
    """Thread-safe. Made by `open_tracing`; close it."""

    def __init__(self, settings: TracingSettings) -> None:
        self._export = Export(settings.sample_ratio)
        self._tracer = self._export.provider.get_tracer(SCOPE)
        self.requests = RequestSpans(self._tracer)

    def serve(
        self, name: str, attributes: Mapping[str, Attribute], parent: str | None, state: str | None
    ) -> ServerSpan | None:
        """The span of an HTTP request that begins now, in this thread, which is in no other from now on; None if it is
        not recorded. `parent` and `state` are the caller's `traceparent` and `tracestate`."""
        epoch = epoch_ns()
        span = self._tracer.start_span(
            name, below_caller(read_caller(parent, state)), SpanKind.SERVER, attributes,
            start_time=epoch + time.monotonic_ns(),
        )  # fmt: skip
        if not span.is_recording():
            current.set(UNRECORDED)
            return None
        served = ServerSpan(span, epoch)
        current.set(served.context)
        return served

    @contextmanager
    def task(self, task: Task) -> Iterator[None]:
        """Around background work: a span, below that of the request which asked for it in this thread, if any."""
        parent = current.get()
        if parent is UNRECORDED:
            yield
            return
        epoch = parent.epoch_ns if parent is not None else epoch_ns()
        span = self._tracer.start_span(
            f"task {task.kind}", below(parent), start_time=epoch + time.monotonic_ns(), attributes=_described(task)
        )
        inner = context_of(span, epoch)
        token = current.set(inner if span.is_recording() else UNRECORDED)
        try:
            yield
        except BaseException as error:
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(StatusCode.ERROR, str(error))
            raise
        finally:
            current.reset(token)
            span.end(unix_ns(inner, time.monotonic()))

    def close(self) -> None:
        """Send what there is, within a few seconds. Safe to call twice."""
        self.requests.close()
        self._export.close()


def _described(task: Task) -> Mapping[str, Attribute]:
    return {
        "vramancer.task.id": task.id,
        "vramancer.task.kind": task.kind,
        "vramancer.task.detail": task.detail,
        "vramancer.task.priority": task.priority,
        "vramancer.task.resource": task.resource,
    }
