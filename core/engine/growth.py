"""What a node that joins is good for: the model is placed anew in thought, and, where that was asked for, in fact."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from core.cluster.choice import with_nodes
from core.cluster.master import Change, Master
from core.cluster.node import Node
from core.config import Settings
from core.engine.model_engine import ModelEngine
from core.engine.relocation import Relocation
from core.errors import EngineDeadError, VRAMancerError
from core.logs import get_logger
from core.metrics.tasks import TaskLog

logger = get_logger(__name__)

WORTH = 1.05
"""So many times as fast has a placement to be for the model to move by itself."""
QUIET_WAIT_S = 60.0
"""How long a move waits for a moment in which nothing runs. Streams survive it anyway, after a pause."""
CLOSE_S = 5.0
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Offer:
    """What all devices of all nodes together would do. Tokens per second by number of streams; `devices` is what to
    place the model on, None for everything."""

    tokens_per_second: Mapping[int, float]
    now: Mapping[int, float]
    devices: str | None

    @property
    def gain(self) -> float:
        """How many times as fast, at the most streams."""
        streams = max(self.tokens_per_second)
        return self.tokens_per_second[streams] / max(self.now[streams], 1e-9)


class Keeper(Protocol):
    """What this needs of whoever keeps the engine."""

    engine: ModelEngine | None
    closing: bool

    def exclusive(self, *, wait: bool = False) -> AbstractContextManager[None]: ...
    def outlook(self, engine: ModelEngine, settings: Settings) -> Relocation: ...
    def place(self, engine: ModelEngine, settings: Settings) -> Relocation: ...


class Growth:
    """`offer` is what is known of the nodes that are there now; None: of none, or it would be no faster. `acts`: the
    model moves by itself. `looks` counts those that are over. Thread-safe.

    Looking holds no lock: a node may take minutes to measure itself, and recovery does not wait for that.
    """

    def __init__(self, keeper: Keeper, cluster: Master, tasks: TaskLog, *, acts: bool) -> None:
        self.offer: Offer | None = None
        self.looks = 0
        self._keeper = keeper
        self._cluster = cluster
        self._tasks = tasks
        self._acts = acts
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._changes = 0
        self._wanted = False
        self._thread: threading.Thread | None = None
        self._own: tuple[str | None, str | None] | None = None
        """What a user had the model placed on, and what became of it when it moved by itself."""
        cluster.on_change.append(self._nodes_changed)

    def close(self) -> None:
        """The server shuts down: waits a while for what is being done. What a node is asked ends with its links."""
        self._closed.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(CLOSE_S)

    def look_soon(self) -> None:
        """A model has been loaded, or nodes have changed: see what they are good for. Does not wait."""
        with self._lock:
            self._changes += 1
            self.offer = None
            self._wanted = not self._closed.is_set()
            if self._wanted and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="vrm-growth", daemon=True)
                self._thread.start()

    def _nodes_changed(self, change: Change, node: Node) -> None:
        self.look_soon()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted or self._closed.is_set():
                    self._thread = None
                    return
                self._wanted = False
                changes = self._changes
            self._look(changes)
            self.looks += 1

    def _look(self, changes: int) -> None:
        try:
            engine = self._keeper.engine
            settings = self._everywhere(engine) if engine is not None and self._cluster.nodes else None
            if engine is None or settings is None:
                return
            offer = self._judge(engine, settings)
            with self._lock:
                if changes != self._changes or self._keeper.engine is not engine:
                    return  # it is looked at again
                self.offer = offer
            if offer is not None and self._acts:
                self._act(engine, settings)
        except EngineDeadError:
            logger.debug("the server shuts down instead")
        except VRAMancerError as error:
            logger.warning("the model does not move onto the nodes that are there", reason=error.message)
        except Exception as error:  # the next node that joins is looked at all the same
            logger.error("what nodes are good for could not be found out", exc_info=error)

    def _act(self, engine: ModelEngine, settings: Settings) -> None:
        self._await_quiet(engine)
        with self._keeper.exclusive(wait=True), self._tasks.run("placement", engine.model.name, asked=False):
            if self._keeper.engine is not engine:
                return
            self._keeper.place(engine, settings)
        self._own = self._chosen(engine), settings.devices.devices
        self.offer = None

    def _chosen(self, engine: ModelEngine) -> str | None:
        """The devices that a user chose, also after the model has moved by itself."""
        now = engine.settings.devices.devices
        return self._own[0] if self._own is not None and self._own[1] == now else now

    def _everywhere(self, engine: ModelEngine) -> Settings | None:
        """The engine's settings, for what it may use here and all that nodes have; None where nodes or cuts were chosen
        by hand."""
        base, chosen = engine.settings.devices, self._chosen(engine)
        devices = with_nodes(chosen, self._cluster.devices(0))
        if (devices == chosen and devices is not None) or base.layers is not None:
            return None
        return engine.settings.model_copy(update={"devices": base.model_copy(update={"devices": devices})})

    def _judge(self, engine: ModelEngine, settings: Settings) -> Offer | None:
        found = self._keeper.outlook(engine, settings)
        if not found.tokens_per_second or not found.moved_layers or engine.plan.prediction is None:
            return None
        now = {streams: round(engine.predicted_tok_s(streams), 2) for streams in found.tokens_per_second}
        offer = Offer(found.tokens_per_second, now, settings.devices.devices)
        worth = offer.gain >= WORTH
        logger.info(
            "all nodes together would serve faster" if worth else "the nodes that are there make nothing faster",
            tokens_per_second=dict(offer.tokens_per_second), now=now,
        )  # fmt: skip
        return offer if worth else None

    def _await_quiet(self, engine: ModelEngine) -> None:
        deadline_s = time.monotonic() + QUIET_WAIT_S
        while time.monotonic() < deadline_s and not self._closed.is_set():
            stats = engine.batcher.stats
            if not stats.running and not stats.waiting:
                return
            self._closed.wait(_LOOK_S)
