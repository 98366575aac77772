"""The engine's side of one HTTP request: submitted as a whole, read as one stream, given up as a whole.

OpenAI's streams are server-sent events: one `data:` line per chunk, comments while nothing comes, `[DONE]` at the end.
An error in the middle of a stream is sent as an event `{"error": {...}}`, which OpenAI's clients raise; the stream
then ends without `[DONE]`, so that a client that does not look at it sees an answer that was cut off.
"""

from __future__ import annotations

import hashlib
import math
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from flask import Response, g, request

from core.api.body import to_json
from core.api.context import api_context, current_span
from core.api.errors import ClientDisconnectedError, unexpected_error
from core.batching.output import Gathered, RequestHandle, Sink
from core.batching.sequence import RawAnswer
from core.engine.submission import LoadedModel
from core.errors import InvalidRequestError, VRAMancerError
from core.logs import get_logger
from core.request import GenerationResult, RequestOutput, SamplingParams, SequenceDelta, TraceContext
from core.security.access import Principal
from core.security.admission import DISCONNECTED_KEY

if TYPE_CHECKING:
    from core.tracing.server import ServerSpan

log = get_logger(__name__)

POLL_INTERVAL_S = 0.25  # how soon a vanished client is noticed
LEAST_LOGPROB = -9999.0  # what OpenAI writes for a probability of 0, since JSON has no infinity
DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

OPERATIONS = {
    "chatcmpl": "chat", "cmpl": "text_completion", "batch": "text_completion", "gen": "text_completion",
    "infer": "infer", "msg": "chat", "resp": "chat",
}  # fmt: skip
"""What OpenTelemetry calls them, by the prefix of their ids."""

EngineRequest = tuple[Sequence[int], SamplingParams]


class Generation:
    """One or more engine requests whose outputs arrive in one queue. Close it: what still runs is then aborted."""

    def __init__(
        self,
        generation_id: str,
        handles: Sequence[RequestHandle],
        sink: Sink,
        *,
        client_gone: Callable[[], bool],
        on_close: Callable[[], None],
        span: ServerSpan | None = None,
    ) -> None:
        self.id = generation_id
        self._handles = handles
        self._sink = sink
        self._client_gone = client_gone
        self._on_close = on_close
        self._span = span
        self._open = set(range(len(handles)))

    def outputs(self) -> Iterator[tuple[int, RequestOutput] | None]:
        """`(index of the engine request, output)` in order of arrival; None whenever nothing came for a while.

        Raises:
            VRAMancerError: one of the requests failed.
            ClientDisconnectedError: nobody is there to read the answer.
        """
        for event in self._events():
            if event is None:
                yield None
                continue
            index, message = event
            if isinstance(message, VRAMancerError):
                raise message
            yield index, message

    def gather(
        self, on_output: Callable[[int, RequestOutput], None] = lambda index, output: None
    ) -> list[GenerationResult]:
        """Wait for all of them, telling `on_output` of each output and its request. Raises like `outputs`."""
        gathered = [Gathered(handle.params) for handle in self._handles]
        for index, output in filter(None, self.outputs()):
            gathered[index].add(output)
            on_output(index, output)
        return [item.result() for item in gathered]

    def gather_each(self) -> list[GenerationResult | VRAMancerError]:
        """Wait for all of them; a request that fails leaves its error in its place, and the others go on."""
        gathered = [Gathered(handle.params) for handle in self._handles]
        errors: dict[int, VRAMancerError] = {}
        for index, message in filter(None, self._events()):
            if isinstance(message, VRAMancerError):
                errors[index] = message
            else:
                gathered[index].add(message)
        return [errors[index] if index in errors else item.result() for index, item in enumerate(gathered)]

    def _events(self) -> Iterator[tuple[int, RequestOutput | VRAMancerError] | None]:
        looked_s = time.monotonic()
        while self._open:
            try:
                event = self._sink.get(timeout=POLL_INTERVAL_S)
            except queue.Empty:
                event = None
            if time.monotonic() - looked_s >= POLL_INTERVAL_S:
                looked_s = time.monotonic()
                if self._client_gone():
                    raise ClientDisconnectedError
            if event is not None:
                index, message = event
                if isinstance(message, VRAMancerError) or message.finished:
                    self._open.discard(index)
                if self._span is not None:
                    self._span.saw(index, message)
            yield event

    def leave_request(self) -> None:
        """It goes on after the HTTP request that began it has been answered, whoever is there."""
        self._client_gone = _never
        if self._span is not None:
            self._span.left()
        self._span = None

    def failed(self, error: Exception) -> None:
        """Its answer could not be made, though the status was sent."""
        if self._span is not None:
            self._span.fail(error)

    def close(self) -> None:
        """Abort what is unfinished. Safe to call twice."""
        if self._open and self._span is not None:
            self._span.gave_up()
        for index in sorted(self._open):
            self._handles[index].abort()
        self._open.clear()
        self._on_close()


def start_generation(
    requests: Sequence[EngineRequest],
    model: LoadedModel,
    *,
    prefix: str,
    priority: int | None,
    names: Mapping[str, str] | None = None,
) -> Generation:
    """Submit for the current HTTP request and its caller, all or nothing, if `model` is still served.

    Its id is `prefix` and a random part. `names` gives what the client calls `prompt` and `max_tokens`.

    Raises:
        VRAMancerError: whatever the pipeline refuses the requests for.
    """
    pipeline = api_context().pipeline

    def submit(generation_id: str, sink: Sink, owner: str, span: ServerSpan | None) -> list[RequestHandle]:
        trace = _describe(span, prefix, generation_id, model, [params for _, params in requests])
        return pipeline.submit_many(
            requests, priority=priority or 0, request_id=generation_id, sink=sink, model=model, owner=owner, trace=trace
        )

    try:
        return _started(prefix, submit)
    except InvalidRequestError as error:
        error.param = (names or {}).get(error.param or "", error.param)
        raise


def start_inference(token_ids: Sequence[int], raw: RawAnswer, model: LoadedModel) -> Generation:
    """The same for numbers of a prompt, which come into `raw`."""
    return start_inferences([(token_ids, raw)], model)


def start_inferences(asked: Sequence[tuple[Sequence[int], RawAnswer]], model: LoadedModel) -> Generation:
    """The same for numbers of several prompts."""
    pipeline = api_context().pipeline

    def submit(generation_id: str, sink: Sink, owner: str, span: ServerSpan | None) -> list[RequestHandle]:
        trace = _describe(span, "infer", generation_id, model, [SamplingParams()] * len(asked))
        return pipeline.submit_raw_many(
            asked, request_id=generation_id, sink=sink, model=model, owner=owner, trace=trace
        )

    return _started("infer", submit)


def _describe(
    span: ServerSpan | None, prefix: str, generation_id: str, model: LoadedModel, params: Sequence[SamplingParams]
) -> TraceContext | None:
    """Put what is asked into the request's span. Returns where the engine's spans belong, if they are recorded."""
    if span is None:
        return None
    span.generation(OPERATIONS[prefix], generation_id, model.name, params)
    return span.context


def _started(prefix: str, submit: Callable[[str, Sink, str, ServerSpan | None], list[RequestHandle]]) -> Generation:
    """`submit` is given the generation's id, its sink, its owner and the request's span."""
    context = api_context()
    generation_id = f"{prefix}-{uuid.uuid4().hex}"
    request_id: str = g.request_id
    caller: Principal = g.principal  # no route that generates is public
    sink: Sink = queue.SimpleQueue()
    span = current_span()
    handles = submit(generation_id, sink, caller.owner, span)
    context.live.add(request_id, generation_id)
    return Generation(
        generation_id,
        handles,
        sink,
        client_gone=request.environ.get(DISCONNECTED_KEY, _never),
        on_close=lambda: context.live.discard(request_id, generation_id),
        span=span,
    )


def _never() -> bool:
    """A server that cannot tell: the answer is made to its end."""
    return False


def envelope(generation_id: str, kind: str, model: LoadedModel, name: str | None) -> dict[str, Any]:
    """The head of an answer: id, object, time, and the model by the name that the client used for it."""
    return {
        "id": generation_id,
        "object": kind,
        "created": int(time.time()),
        "model": name or model.name,
        "system_fingerprint": fingerprint(model),
    }


def fingerprint(model: LoadedModel) -> str:
    """Changes with what would change the answers to a seeded request: the weights and their format."""
    text = f"{model.name}|{model.num_parameters}|{model.dtype}"
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(slots=True)
class Usage:
    """Tokens of an answer: each prompt counts once, generated tokens count also where `best_of` dropped them.
    `reasoning_tokens` are those of thoughts, of models that have them (else None), once the answer is complete."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int | None = None
    _seen: set[int] = field(default_factory=set)

    def add_result(self, result: GenerationResult) -> None:
        self.prompt_tokens += result.num_prompt_tokens
        self.cached_tokens += result.num_cached_tokens
        self.completion_tokens += result.num_generated_tokens

    def add_prompt(self, index: int, output: RequestOutput) -> None:
        """Count the prompt of the engine request `index`, if this is its first output."""
        if index not in self._seen:
            self._seen.add(index)
            self.prompt_tokens += output.num_prompt_tokens
            self.cached_tokens += output.num_cached_tokens

    def add_delta(self, delta: SequenceDelta) -> None:
        self.completion_tokens += len(delta.token_ids)

    def add_output(self, index: int, output: RequestOutput) -> None:
        """Count one output of the engine request `index`."""
        self.add_prompt(index, output)
        for delta in output.deltas:
            self.add_delta(delta)

    def to_openai(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens is not None:
            shown["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return shown


def choice(
    index: int,
    content: dict[str, Any],
    logprobs: Any = None,
    finish_reason: str | None = None,
    stop_reason: int | str | None = None,
) -> dict[str, Any]:
    """One choice of an answer or of a chunk of it: its `content`, and what comes with each."""
    return {
        "index": index,
        **content,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB) if not math.isnan(logprob) else LEAST_LOGPROB


class ChunkRenderer(Protocol):
    """Turns engine outputs into the chunks of one kind of stream."""

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]: ...

    def closing(self) -> Iterator[dict[str, Any]]: ...


class ChoiceStream:
    """Chunks of OpenAI's streams: one choice each under the same head, then `usage` if the client asked for it.

    With `continuous_usage` each chunk has what was used up to it, over all choices.
    """

    def __init__(self, head: dict[str, Any], *, include_usage: bool, continuous_usage: bool) -> None:
        self._head = {**head, "usage": None} if include_usage else head
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._usage = Usage()

    def closing(self) -> Iterator[dict[str, Any]]:
        if self._include_usage:
            yield {**self._head, "choices": [], "usage": self._usage.to_openai()}

    def _chunk(self, shown: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "choices": [shown]}
        return {**chunk, "usage": self._usage.to_openai()} if self._continuous_usage else chunk


class Framing:
    """How a stream is written: here as OpenAI's server-sent events, elsewhere as other APIs have it."""

    mimetype = "text/event-stream"
    keep_alive = KEEP_ALIVE
    """Sent while nothing comes; empty: nothing is."""
    done = DONE
    """What follows the last chunk."""

    def chunk(self, chunk: dict[str, Any]) -> str:
        return f"data: {to_json(chunk)}\n\n"

    def error(self, error: VRAMancerError) -> str:
        """The last thing that is sent where the answer fails."""
        return self.chunk(error.to_openai())


OPENAI = Framing()


def stream_response(generation: Generation, renderer: ChunkRenderer, framing: Framing = OPENAI) -> Response:
    """The open stream. However it ends, the generation is closed: by the last event, an error, or the client."""
    keepalive_s = api_context().pipeline.settings.api.keepalive_comment_s
    events = stream_events(generation, renderer, framing, keepalive_s=keepalive_s)
    response = Response(events, mimetype=framing.mimetype, headers=HEADERS)
    response.call_on_close(generation.close)  # a generator that was never started does not run its `finally`
    return response


def stream_events(
    generation: Generation, renderer: ChunkRenderer, framing: Framing = OPENAI, *, keepalive_s: float
) -> Iterator[str]:
    """The stream's text, piece by piece."""
    wrote_s = time.monotonic()
    try:
        for event in generation.outputs():
            pieces = [framing.chunk(chunk) for chunk in renderer.chunks(*event)] if event is not None else []
            if not pieces and framing.keep_alive and time.monotonic() - wrote_s >= keepalive_s:
                pieces = [framing.keep_alive]
            for piece in pieces:
                yield piece
                wrote_s = time.monotonic()
        for chunk in renderer.closing():
            yield framing.chunk(chunk)
        if framing.done:
            yield framing.done
    except ClientDisconnectedError:
        log.info("client left its stream")
    except VRAMancerError as error:
        log.error("stream failed", error=error.message, code=error.error_code)
        yield framing.error(error)
    except Exception as error:  # a bug: the status is already sent, so the error map cannot answer it
        log.error("stream failed unexpectedly", error=repr(error), exc_info=error)
        generation.failed(error)
        yield framing.error(unexpected_error())
    finally:
        generation.close()
