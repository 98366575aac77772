"""Server-sent events: one `data:` line per chunk, comments while nothing comes, `[DONE]` at the end.

An error in the middle of a stream is sent as an event `{"error": {...}}`, which OpenAI's clients raise; the stream
then ends without `[DONE]`, so that a client that does not look at it sees an answer that was cut off.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Protocol

from flask import Response

from core.api.answers import to_json
from core.api.context import api_context
from core.api.errors import ClientDisconnectedError, unexpected_error_body
from core.api.generation import Generation
from core.errors import VRAMancerError
from core.logs import get_logger
from core.request import RequestOutput

log = get_logger(__name__)

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ChunkRenderer(Protocol):
    """Turns engine outputs into the chunks of one kind of stream."""

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]: ...

    def closing(self) -> Iterator[dict[str, Any]]: ...


def stream_response(generation: Generation, renderer: ChunkRenderer) -> Response:
    """The open stream. However it ends, the generation is closed: by the last event, an error, or the client."""
    keepalive_s = api_context().pipeline.settings.api.keepalive_comment_s
    events = stream_events(generation, renderer, keepalive_s=keepalive_s)
    response = Response(events, mimetype="text/event-stream", headers=HEADERS)
    response.call_on_close(generation.close)  # a generator that was never started does not run its `finally`
    return response


def stream_events(generation: Generation, renderer: ChunkRenderer, *, keepalive_s: float) -> Iterator[str]:
    """The stream's text, piece by piece."""
    wrote_s = time.monotonic()
    try:
        for event in generation.outputs():
            pieces = [_event(chunk) for chunk in renderer.chunks(*event)] if event is not None else []
            if not pieces and time.monotonic() - wrote_s >= keepalive_s:
                pieces = [KEEP_ALIVE]
            for piece in pieces:
                yield piece
                wrote_s = time.monotonic()
        for chunk in renderer.closing():
            yield _event(chunk)
        yield DONE
    except ClientDisconnectedError:
        log.info("client left its stream")
    except VRAMancerError as error:
        log.error("stream failed", error=error.message, code=error.error_code)
        yield _event(error.to_openai())
    except Exception as error:  # a bug: the status is already sent, so the error map cannot answer it
        log.error("stream failed unexpectedly", error=repr(error), exc_info=error)
        yield _event(unexpected_error_body())
    finally:
        generation.close()


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {to_json(chunk)}\n\n"
