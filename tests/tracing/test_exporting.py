"""Collectors that are not there, and what is left when the server ends."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from steering import LONGEST_WAIT_S, until
from tracing.collector import Collector
from tracing.conftest import Open, Service

from core.config import TracingSettings
from core.request import FinishedRequest, TraceContext
from core.tracing import exporter, requests
from core.tracing.exporter import SAY_EVERY_S, QuietExporter
from core.tracing.requests import RequestSpans
from core.tracing.tracing import Tracing

ENABLED = TracingSettings(enabled=True)
TRACE = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


def finished(name: str, trace: TraceContext | None = TRACE) -> FinishedRequest:
    return FinishedRequest(name, "stop", 1, 1, 1.0, 2.0, 3.0, 4.0, trace=trace)


class Scripted(SpanExporter):
    """Fails as long as it is told to, with a message each time."""

    def __init__(self) -> None:
        self.fails = True
        self.ended = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if not self.fails:
            return SpanExportResult.SUCCESS
        logging.getLogger(trace_exporter.__name__).warning("connection %s", "refused")
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.ended += 1


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_collector_that_is_gone_is_mentioned_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    scripted = Scripted()
    quiet = QuietExporter(scripted, lambda: now_s)
    spans: Any = ["a", "b"]
    with caplog.at_level(logging.DEBUG):
        for _ in range(5):
            assert quiet.export(spans) is SpanExportResult.FAILURE
            now_s += SAY_EVERY_S / 10
        assert len(said(caplog)) == 1
        assert "spans_lost': 2" in said(caplog)[0] and "connection refused" in said(caplog)[0]
        now_s = SAY_EVERY_S
        quiet.export(spans)
        assert len(said(caplog)) == 2 and "spans_lost': 10" in said(caplog)[1]
        scripted.fails = False
        for _ in range(2):
            assert quiet.export(spans) is SpanExportResult.SUCCESS
    assert len(said(caplog)) == 3 and "sent again" in said(caplog)[2]


def test_what_has_ended_sends_nothing_more() -> None:
    scripted = Scripted()
    scripted.fails = False
    quiet = QuietExporter(scripted)
    quiet.shutdown()
    quiet.shutdown()
    assert scripted.ended == 1
    assert quiet.export([]) is SpanExportResult.FAILURE


def test_requests_are_answered_without_a_collector(
    open_service: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    service = open_service()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert service.complete(3)[0] == 200
        until(lambda: any("traces cannot be sent" in line for line in said(caplog)), "it is said")
        service.end()
    assert len([line for line in said(caplog) if "traces cannot be sent" in line]) == 1
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


def test_an_overloaded_collector_is_asked_again(service: Service, collector: Collector) -> None:
    collector.refuse = True
    service.complete(2)
    until(lambda: collector.posts > 0, "something was sent")
    collector.refuse = False
    service.complete(3)
    service.end()
    assert [span.attributes["gen_ai.usage.output_tokens"] for span in collector.named("decode")][-1] == 3


def test_the_end_waits_only_so_long_for_the_last_spans(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exporter, "FLUSH_S", 0.05)
    gate, asked = threading.Event(), threading.Event()

    def never(self: Any, spans: Any) -> SpanExportResult:
        asked.set()
        gate.wait(LONGEST_WAIT_S)
        return SpanExportResult.FAILURE

    monkeypatch.setattr(exporter, "GIVE_UP_S", 0.05)
    monkeypatch.setattr(trace_exporter.OTLPSpanExporter, "export", never)
    tracing = Tracing(ENABLED)
    tracing.requests.observe_finished(finished("r"))
    assert asked.wait(LONGEST_WAIT_S)
    with caplog.at_level(logging.WARNING):
        tracing.close()  # comes back, though what it waits for does not
    assert any("were not sent before the end" in line for line in said(caplog))
    gate.set()
    until(lambda: not [t for t in threading.enumerate() if t.name == "vrm-traces-flush"], "the thread ends")


def test_all_spans_are_sent_at_the_end(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    tracing = Tracing(ENABLED)
    for number in range(300):
        tracing.requests.observe_finished(finished(f"r{number}"))
    assert collector.posts == 0
    tracing.close()
    tracing.close()
    assert len(collector.named("decode")) == 300


def test_more_requests_than_can_be_kept_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(requests, "MAX_WAITING", 2)
    gate, made = threading.Event(), queue.SimpleQueue[str]()

    def slowly(self: RequestSpans, request: FinishedRequest) -> None:
        made.put(request.request_id)
        gate.wait(LONGEST_WAIT_S)

    monkeypatch.setattr(RequestSpans, "_make", slowly)
    observer = RequestSpans(TracerProvider().get_tracer("t"))
    observer.observe_finished(finished("not traced", trace=None))
    observer.observe_finished(finished("first"))
    assert made.get(timeout=LONGEST_WAIT_S) == "first"
    with caplog.at_level(logging.WARNING):
        for name in ("second", "third", "fourth", "fifth"):
            observer.observe_finished(finished(name))
        gate.set()
        observer.close()
    assert [made.get(timeout=LONGEST_WAIT_S) for _ in range(2)] == ["second", "third"]
    assert made.empty()
    assert any("'left_out': 2" in line for line in said(caplog))


def test_spans_that_cannot_be_made_leave_the_others_alone(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracing = Tracing(ENABLED)
    with caplog.at_level(logging.ERROR):
        tracing.requests.observe_finished(finished("bad", TraceContext("no hexadecimal", "", "")))
        tracing.requests.observe_finished(finished("good"))
        tracing.close()
    assert [span.attributes["vramancer.request.id"] for span in collector.named("decode")] == ["good"]
    assert any("spans could not be made" in line for line in said(caplog))


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [("OTEL_SERVICE_NAME", "mine", "mine"), ("OTEL_RESOURCE_ATTRIBUTES", "service.name=ours,team=red", "ours")],
)
def test_the_service_may_have_another_name(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str
) -> None:
    monkeypatch.setenv(variable, value)
    tracing = Tracing(ENABLED)
    tracing.requests.observe_finished(finished("r"))
    tracing.close()
    assert {span.resource["service.name"] for span in collector.spans} == {name}


def test_a_request_that_never_began_only_waited(collector: Collector) -> None:
    tracing = Tracing(ENABLED)
    tracing.requests.observe_finished(FinishedRequest("r", "abort", 3, 0, 1.0, None, None, 4.0, trace=TRACE))
    tracing.close()
    (queued,) = collector.spans
    assert queued.name == "queue" and queued.attributes["vramancer.request.finish_reason"] == "abort"
    assert (queued.began_ns, queued.ended_ns) == (1_000_000_000, 4_000_000_000)
