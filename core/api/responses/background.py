"""Responses that are made while nobody waits for them.

Each has a thread that reads what the engine gives and keeps the response as it changes. They live in the process alone:
with it, what is not complete by then ends.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from core.api.errors import unexpected_error
from core.api.generation import Generation
from core.api.responses.answers import ResponseWriter
from core.errors import QueueFullError, UnavailableError, VRAMancerError
from core.logs import get_logger

log = get_logger(__name__)

MAX_OF_A_KEY = 16
MAX_RUNNING = 64
"""Of all keys. Each has a thread, and a place in the engine's queue as any request."""
RETRY_AFTER_S = 5.0


class BackgroundResponses:
    """Any thread."""

    def __init__(self, max_of_a_key: int = MAX_OF_A_KEY, max_running: int = MAX_RUNNING) -> None:
        self._max_of_a_key = max_of_a_key
        self._max_running = max_running
        self._lock = threading.Lock()
        self._places: Counter[str] = Counter()
        """Taken, by owner."""

    @contextmanager
    def place(self, owner: str) -> Iterator[Place]:
        """A place for one more, which is given back unless a response is begun in it. Raises `QueueFullError`."""
        with self._lock:
            if self._places[owner] >= self._max_of_a_key or self._places.total() >= self._max_running:
                raise QueueFullError(
                    f"A key has at most {self._max_of_a_key} responses in the background at a time, and all keys "
                    f"{self._max_running}: wait until one is complete, or cancel one.",
                    retry_after_s=RETRY_AFTER_S,
                )
            self._places[owner] += 1
        place = Place(self, owner)
        try:
            yield place
        finally:
            if not place.begun:
                self.give_back(owner)

    def give_back(self, owner: str) -> None:
        with self._lock:
            self._places[owner] -= 1
            if not self._places[owner]:
                del self._places[owner]

    def __len__(self) -> int:
        """How many run."""
        with self._lock:
            return self._places.total()


class Place:
    """Room for a response that is made in the background."""

    def __init__(self, responses: BackgroundResponses, owner: str) -> None:
        self.begun = False
        self._responses = responses
        self._owner = owner

    def begin(self, generation: Generation, writer: ResponseWriter) -> None:
        """Make the response, and give the place back at its end.

        Raises `UnavailableError` if no thread can be had for it.
        """
        name = f"vrm-background-{generation.id[-8:]}"
        thread = threading.Thread(target=self._run, args=(generation, writer), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            generation.close()
            error = UnavailableError("The server has no thread for a response in the background.")
            writer.failed(error)
            raise error from None
        self.begun = True

    def _run(self, generation: Generation, writer: ResponseWriter) -> None:
        try:
            for index, output in filter(None, generation.outputs()):
                for _ in writer.chunks(index, output):
                    pass
            for _ in writer.closing():
                pass
        except VRAMancerError as error:
            log.error("background response failed", error=error.message, code=error.error_code)
            writer.failed(error)
        except Exception as error:
            log.error("background response failed unexpectedly", error=repr(error), exc_info=error)
            with suppress(Exception):  # the bug may be in the writer
                writer.failed(unexpected_error())
        finally:
            generation.close()
            self._responses.give_back(self._owner)
