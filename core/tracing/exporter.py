"""Spans on their way to a collector: batches, a queue with a bound, few words when nobody takes them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from core.logs import get_logger

log = get_logger(__name__)

SERVICE_NAME = "vramancer"
UNNAMED = "unknown_service"
SAY_EVERY_S = 60.0
"""How often at most it is said that spans cannot be sent."""
FLUSH_S = 5.0
"""How long the end of the server waits for spans to be sent."""
GIVE_UP_S = 1.0
"""And then for what sends them."""


class _Causes(logging.Filter):
    """Keeps the last message of the exporter, which says one for every try, to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        self.last = record.getMessage()
        return False


_causes = _Causes()
logging.getLogger(trace_exporter.__name__).addFilter(_causes)


class QuietExporter(SpanExporter):
    """Says once in a while that spans could not be sent, how many were lost, and why. The export thread's, but for
    `shutdown`."""

    def __init__(self, exporter: SpanExporter, clock: Callable[[], float] = time.monotonic) -> None:
        self._exporter = exporter
        self._clock = clock
        self._lost = 0
        self._said_s: float | None = None
        self._ended = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._ended:
            return SpanExportResult.FAILURE
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            self._sent()
        else:
            self._failed(len(spans))
        return result

    def _failed(self, spans: int) -> None:
        self._lost += spans
        now_s = self._clock()
        if self._said_s is None or now_s - self._said_s >= SAY_EVERY_S:
            log.warning("traces cannot be sent", spans_lost=self._lost, reason=_causes.last)
            self._said_s, self._lost = now_s, 0

    def _sent(self) -> None:
        if self._said_s is not None:
            log.info("traces are sent again", spans_lost=self._lost)
            self._said_s, self._lost = None, 0

    def shutdown(self) -> None:
        """Ends waits between tries. Safe to call twice."""
        if not self._ended:
            self._ended = True
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is held here."""
        return True


class Export:
    """`provider` makes the tracers whose spans are sent. Where to is OpenTelemetry's own configuration."""

    def __init__(self, sample_ratio: float) -> None:
        self._exporter = QuietExporter(trace_exporter.OTLPSpanExporter())
        self.provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(sample_ratio), resource=_resource(), shutdown_on_exit=False
        )
        self.provider.add_span_processor(BatchSpanProcessor(self._exporter))

    def close(self) -> None:
        """Send what is left, within `FLUSH_S`. What takes longer is lost."""
        sender = threading.Thread(target=self.provider.shutdown, name="vrm-traces-flush", daemon=True)
        sender.start()
        sender.join(FLUSH_S)
        if sender.is_alive():
            log.warning("traces were not sent before the end", seconds=FLUSH_S)
            self._exporter.shutdown()
            sender.join(GIVE_UP_S)


def _resource() -> Resource:
    """Who sends, unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES` say otherwise."""
    found = Resource.create()
    named = str(found.attributes.get("service.name", ""))
    return found.merge(Resource({"service.name": SERVICE_NAME})) if named.startswith(UNNAMED) else found
