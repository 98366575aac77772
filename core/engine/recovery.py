"""What happens when a device or a node is lost: the model moves to those that are left. Where these cannot hold it,
requests wait for a node that comes, or comes back, for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from core.cluster.master import Change, Master
from core.cluster.node import Node
from core.config import Settings
from core.devices import Device
from core.engine.model_engine import ModelEngine
from core.errors import DeviceLostError, EngineDeadError, InsufficientMemoryError, VRAMancerError
from core.logs import get_logger

logger = get_logger(__name__)

Relocate = Callable[[ModelEngine, Settings, tuple[Device, ...], frozenset[str], str], None]
"""Moves an engine to devices, without those that are lost; the text says what for. Raises what planning and loading
raise."""


class Keeper(Protocol):
    """What recovery needs to know of whoever keeps the engine."""

    engine: ModelEngine | None
    closing: bool

    def exclusive(self, *, wait: bool = False) -> AbstractContextManager[None]: ...


class Recovery:
    """`missing` says why nothing is computed although a model is loaded; None while that is not so. Thread-safe."""

    def __init__(self, keeper: Keeper, relocate: Relocate, cluster: Master | None) -> None:
        self._keeper = keeper
        self._relocate = relocate
        self._cluster = cluster
        self.missing: str | None = None
        self._lost: frozenset[str] = frozenset()
        self._timer: threading.Timer | None = None
        if cluster is not None:
            cluster.on_change.append(self._nodes_changed)

    def close(self) -> None:
        """The server shuts down."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    # -- what is heard ----------------------------------------------------------------------------------------------

    def device_lost(self, error: DeviceLostError) -> bool:
        """A device of the engine does not answer. True: what runs there waits, and is seen to. In the engine's thread,
        or in any if it is idle."""
        engine = self._keeper.engine
        if self._keeper.closing or engine is None:
            return False
        lost = self._lost_with(error.device, engine)
        if self._cluster is None and not self._left(engine, lost):
            return False
        logger.error("a device is lost", device=error.device, reason=error.message)
        threading.Thread(
            target=self._leave, args=(engine, error.device, lost), name="vrm-relocation", daemon=True
        ).start()
        return True

    def _nodes_changed(self, change: Change, node: Node) -> None:
        """A node has joined, wants to go, or is lost."""
        if change == "leaving":
            self._drain(node)
            return
        engine = self._keeper.engine
        if engine is None:
            return
        if change == "joined":
            if self.missing is not None:
                self._leave(engine, "", self._lost)
            return
        used = {device.name for device in _used(engine)}
        for name in node.devices:
            if name in used:  # also if nothing runs that could notice
                self.device_lost(DeviceLostError(f"{name}: {node.name} is lost", device=name))
                return

    # -- what is done -----------------------------------------------------------------------------------------------

    def _lost_with(self, name: str, engine: ModelEngine) -> frozenset[str]:
        """Devices that are lost if one is: with a node that has gone all of them, and those that were lost before."""
        node = next((device.node for device in engine.plan.devices if device.name == name), "")
        lost = frozenset({name})
        if node and self._cluster is not None and not self._cluster.has(node):
            lost = frozenset(device.name for device in engine.plan.devices if device.node == node)
        return lost | (self._lost if self.missing is not None else frozenset())

    def _left(self, engine: ModelEngine, lost: frozenset[str]) -> tuple[Device, ...]:
        """The devices that the engine was given, but for those that have gone."""
        return tuple(device for device in engine.plan.devices if device.name not in lost and self._is_there(device))

    def _is_there(self, device: Device) -> bool:
        return device.is_here or (self._cluster is not None and self._cluster.has(device.node))

    def _choices(self, engine: ModelEngine, lost: frozenset[str]) -> Iterator[tuple[Device, ...]]:
        """Devices to try, the ones that were asked for first, then all that there are."""
        left = self._left(engine, lost)
        if left:
            yield left
        if self._cluster is None:
            return
        here = tuple(device for device in left if device.is_here)
        everything = (*here, *self._cluster.devices(len(here)))
        if everything and {device.name for device in everything} != {device.name for device in left}:
            yield everything

    def _leave(self, engine: ModelEngine, device: str, lost: frozenset[str]) -> None:
        if self._keeper.closing:
            return
        try:
            with self._keeper.exclusive(wait=True):
                if self._keeper.engine is engine:
                    self._move(engine, device, lost)
        except EngineDeadError:
            logger.debug("the server shuts down instead")

    def _drain(self, node: Node) -> None:
        """Move what is computed by a node that wants to go, while it still computes."""
        try:
            with self._keeper.exclusive(wait=True):
                engine = self._keeper.engine
                if engine is None or node.name not in {device.node for device in _used(engine)}:
                    return
                settings, reason = _anywhere(engine), "no other device is there"
                for devices in self._choices(engine, frozenset()):
                    try:
                        self._relocate(engine, settings, _numbered(devices), frozenset(), f"{node.name} leaves")
                    except Exception as error:  # noqa: BLE001  whatever it was, the node is asked again
                        reason = error.message if isinstance(error, VRAMancerError) else repr(error)
                        if self._keeper.engine is not engine:
                            break
                        continue
                    return
                logger.warning("a node cannot leave yet: it is needed", node=node.name, reason=reason)
        except EngineDeadError:
            logger.debug("the server shuts down instead")

    def _move(self, engine: ModelEngine, device: str, lost: frozenset[str]) -> None:
        settings = _anywhere(engine)
        if self._cluster is not None:
            gone = device or ", ".join(sorted(lost))
            self._cluster.begin_epoch(DeviceLostError(f"{gone} is lost", device=gone))
        failure: Exception | None = None
        for devices in self._choices(engine, lost):
            try:
                self._relocate(
                    engine, settings, _numbered(devices), lost, f"without {device}" if device else "on other devices"
                )
            except EngineDeadError:
                raise
            except Exception as error:  # noqa: BLE001  whatever it was, requests must not wait for ever
                failure = error
                continue
            self.forget()
            return
        if self._keeper.engine is engine and not self._keeper.closing:
            self._wait(engine, lost, failure)

    def _wait(self, engine: ModelEngine, lost: frozenset[str], failure: Exception | None) -> None:
        """Nothing that is left can hold the model. Without other machines nothing can come."""
        no_room = failure is None or isinstance(failure, InsufficientMemoryError)
        if no_room or isinstance(failure, DeviceLostError):
            logger.error("requests wait for devices", model=engine.model.name, lost=sorted(lost))
        else:
            logger.error("the model could not be moved off a lost device", lost=sorted(lost), exc_info=failure)
        waits = self.missing is not None
        reason = "does not fit" if no_room else "cannot run"
        then = "it goes on when that is back" if self._cluster is not None else "load it again"
        self._lost = lost
        self.missing = f"{engine.model.name} {reason} without {', '.join(sorted(lost))}; {then}."
        if self._cluster is None:
            self._give_up(engine)
        elif not waits:
            self._timer = threading.Timer(self._cluster.wait_s, self._waited, [engine])
            self._timer.name, self._timer.daemon = "vrm-recovery", True
            self._timer.start()

    def forget(self) -> None:
        """Another engine is served, or none: nothing is missing."""
        self.missing, self._lost = None, frozenset()
        if self._timer is not None:
            self._timer.cancel()

    def _waited(self, engine: ModelEngine) -> None:
        """For long enough. New requests are refused as before; a node that comes later is taken all the same."""
        try:
            with self._keeper.exclusive(wait=True):
                if self._keeper.engine is engine and self.missing is not None:
                    self._give_up(engine)
        except EngineDeadError:
            logger.debug("the server shuts down instead")

    def _give_up(self, engine: ModelEngine) -> None:
        """Requests that wait fail, and hear why."""
        engine.batcher.on_lost = lambda error: False
        engine.batcher.park()  # if it has not by itself
        engine.batcher.resume()


def _anywhere(engine: ModelEngine) -> Settings:
    """The engine's settings, without cuts that were made by hand for other devices."""
    placed = engine.settings.devices.model_copy(update={"layers": None})
    return engine.settings.model_copy(update={"devices": placed})


def _numbered(devices: tuple[Device, ...]) -> tuple[Device, ...]:
    return tuple(replace(each, index=index) for index, each in enumerate(devices))


def _used(engine: ModelEngine) -> list[Device]:
    """Those that hold layers, or lend to those of other machines that do."""
    plan = engine.plan
    used = {stage.device_name for stage in plan.placement.stages} | {lender for _, lender in plan.pooled.far}
    return [device for device in plan.devices if device.name in used]
