"""From our trace contexts to OpenTelemetry's, and back."""

from __future__ import annotations

import time
from contextvars import ContextVar

from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags, TraceState, set_span_in_context

from core.request import TraceContext
from core.tracing.w3c import Caller, read_state, write_state

NS_PER_S = 1e9

current: ContextVar[TraceContext | None] = ContextVar("current", default=None)
"""The span that this thread works in."""
UNRECORDED = TraceContext("", "")
"""As `current`: what this thread works for is not recorded."""


def epoch_ns() -> int:
    """The Unix time at which `time.monotonic()` was 0, by the clock as it is now."""
    return time.time_ns() - time.monotonic_ns()


def unix_ns(trace: TraceContext, seconds: float) -> int:
    """The Unix time of a moment by `time.monotonic()`, on the trace's clock."""
    return trace.epoch_ns + round(seconds * NS_PER_S)


def context_of(span: Span, epoch: int) -> TraceContext:
    """Where its children belong."""
    ids = span.get_span_context()
    state = write_state(tuple(ids.trace_state.items()))
    return TraceContext(f"{ids.trace_id:032x}", f"{ids.span_id:016x}", state, epoch)


def below(trace: TraceContext | None) -> Context:
    """What makes a new span a child; None: it begins a trace."""
    if trace is None:
        return Context()
    return _parent(trace.trace_id, trace.span_id, TraceFlags.SAMPLED, read_state(trace.state), is_remote=False)


def below_caller(caller: Caller | None) -> Context:
    """The same, for who is in another process."""
    if caller is None:
        return Context()
    flags = TraceFlags.SAMPLED if caller.sampled else TraceFlags.DEFAULT
    return _parent(caller.trace_id, caller.span_id, flags, caller.state, is_remote=True)


def _parent(trace_id: str, span_id: str, flags: int, state: tuple[tuple[str, str], ...], *, is_remote: bool) -> Context:
    ids = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote, TraceFlags(flags), TraceState(list(state)))
    return set_span_in_context(NonRecordingSpan(ids), Context())
