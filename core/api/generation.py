"""The engine's side of one HTTP request: submitted as a whole, read as one stream, given up as a whole."""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from flask import g, request

from core.api.connection import disconnect_probe
from core.api.context import api_context
from core.api.errors import ClientDisconnectedError
from core.batching.output import Gathered, RequestHandle, Sink
from core.engine.model_engine import LoadedModel
from core.errors import VRAMancerError
from core.request import GenerationResult, RequestOutput, SamplingParams

POLL_INTERVAL_S = 0.25  # how soon a vanished client is noticed

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
    ) -> None:
        self.id = generation_id
        self._handles = handles
        self._sink = sink
        self._client_gone = client_gone
        self._on_close = on_close
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

    def gather(self, on_output: Callable[[RequestOutput], None] | None = None) -> list[GenerationResult]:
        """Wait for all of them, telling `on_output` of each output. Raises like `outputs`."""
        gathered = [Gathered(handle.params) for handle in self._handles]
        for event in self.outputs():
            if event is not None:
                index, output = event
                gathered[index].add(output)
                if on_output is not None:
                    on_output(output)
        return [item.result() for item in gathered]

    def gather_each(self) -> list[GenerationResult | VRAMancerError]:
        """Wait for all of them; a request that fails leaves its error in its place, and the others go on."""
        gathered = [Gathered(handle.params) for handle in self._handles]
        errors: dict[int, VRAMancerError] = {}
        for event in self._events():
            if event is None:
                continue
            index, message = event
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
            yield event

    def close(self) -> None:
        """Abort what is unfinished. Safe to call twice."""
        for index in sorted(self._open):
            self._handles[index].abort()
        self._open.clear()
        self._on_close()


def start_generation(
    requests: Sequence[EngineRequest], model: LoadedModel, *, prefix: str, priority: int | None
) -> Generation:
    """Submit for the current HTTP request, all or nothing, if `model` is still served.

    Its id is `prefix` and a random part.

    Raises:
        VRAMancerError: whatever the pipeline refuses the requests for.
    """
    context = api_context()
    generation_id = f"{prefix}-{uuid.uuid4().hex}"
    request_id: str = g.request_id
    sink: Sink = queue.SimpleQueue()
    handles = context.pipeline.submit_many(
        requests, priority=priority or 0, request_id=generation_id, sink=sink, model=model
    )
    context.live.add(request_id, generation_id)
    return Generation(
        generation_id,
        handles,
        sink,
        client_gone=disconnect_probe(request.environ),
        on_close=lambda: context.live.discard(request_id, generation_id),
    )
