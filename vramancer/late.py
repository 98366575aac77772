"""A server that answers before its model is there: the machines that the model takes have not joined yet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from core.config import Settings
from core.errors import (
    ConflictError,
    EngineDeadError,
    InsufficientMemoryError,
    MissingNodeError,
    NetworkError,
    VRAMancerError,
)
from core.logs import get_logger

if TYPE_CHECKING:
    from core.cluster.master import Change, Master
    from core.cluster.node import Node
    from core.inference_pipeline import InferencePipeline

logger = get_logger(__name__)


def may_come(settings: Settings, error: VRAMancerError) -> bool:
    """Whether machines that join can cure what a load has failed with: more memory is used where devices of others may
    be."""
    from core.cluster.choice import divide

    if not isinstance(error, MissingNodeError | InsufficientMemoryError | NetworkError):
        return False
    _, there = divide(settings.devices.devices)
    return there is None or bool(there) or not isinstance(error, InsufficientMemoryError)


class LateLoad:
    """Tries to load the model whenever the cluster has changed, in a thread of its own, until it is loaded, by
    whomever. `on_loaded` is called then, and `on_failed` once an error has come that no machine can cure: `error` keeps
    it."""

    def __init__(
        self, pipeline: InferencePipeline, master: Master, reason: str, *, on_loaded: Callable[[], None],
        on_failed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.error: VRAMancerError | None = None
        self._pipeline = pipeline
        self._on_loaded, self._on_failed = on_loaded, on_failed
        self._closing = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vrm-late-load", daemon=True)
        pipeline.waiting_for = reason
        master.on_change.append(self._cluster_changed)
        self._changed.set()  # a machine may have come since the load failed

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """After the pipeline, whose end ends a load that is under way."""
        self._closing.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _cluster_changed(self, change: Change, node: Node) -> None:
        self._changed.set()

    def _run(self) -> None:
        while self._changed.wait():
            self._changed.clear()
            if self._closing.is_set() or self._try():
                return

    def _try(self) -> bool:
        """Whether that was the last time."""
        try:
            if self._pipeline.current_engine is None:
                self._pipeline.load()
        except (EngineDeadError, ConflictError) as error:  # the server stops, or somebody loads a model by call
            logger.debug("the model is not loaded now", reason=error.message)
            return isinstance(error, EngineDeadError)
        except VRAMancerError as error:
            if may_come(self._pipeline.settings, error):
                self._pipeline.waiting_for = error.message
                return False
            self.error = error
            self._on_failed()
            return True
        self._pipeline.waiting_for = None
        self._on_loaded()
        return True
