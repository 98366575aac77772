"""Ends that say nothing are noticed, those that say something are left alone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from network.test_link import Recorder
from steering import until

from core.errors import LinkLostError, NetworkError
from core.network.echo import Echo
from core.network.frames import Header, Opcode
from core.network.link import Link
from core.network.watch import Watch


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch(0.4)
    yield made
    made.close()


def ends(heartbeat_s: float | None) -> tuple[Link, Link, Recorder]:
    sockets, here = socket.socketpair(), Recorder()
    near = Link(sockets[0], 1, 2, here, name="near")
    far = Link(sockets[1], 2, 1, Recorder(), name="far", heartbeat_s=heartbeat_s)
    near.start()
    return near, far, here


def test_an_end_that_is_silent_is_given_up(watch: Watch) -> None:
    near, far, here = ends(None)
    watch.add(near)
    until(lambda: here.errors, "the loss")
    (error,) = here.errors
    assert isinstance(error, LinkLostError) and "silent for" in error.message and near.error is error
    far.start()
    near.close()
    far.close()


def test_an_end_that_gives_signs_of_life_is_kept(watch: Watch) -> None:
    near, far, here = ends(0.02)
    far.start()
    watch.add(near)
    heard_s = near.heard_s
    until(lambda: near.heard_s > heard_s + 1.2, "signs of life for three times the patience")
    assert not here.errors and not here.frames  # they are the link's own business
    near.close()
    far.close()


class Steps:
    """In place of a watch's waiting and its clock: it looks when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.ended = 0.0, False
        self._go, self._looked = threading.Semaphore(0), threading.Semaphore(0)
        monkeypatch.setattr("core.network.watch.time", SimpleNamespace(monotonic=lambda: self.now_s))
        parts = SimpleNamespace(Event=lambda: self, Lock=threading.Lock, Thread=threading.Thread)
        monkeypatch.setattr("core.network.watch.threading", parts)

    def wait(self, timeout_s: float) -> bool:
        self._looked.release()
        self._go.acquire()
        return self.ended

    def set(self) -> None:
        self.ended = True
        self._go.release()

    def look(self, now_s: float) -> None:
        """Let it look once, at this time."""
        if now_s == 0.0:
            self._looked.acquire()
        self.now_s = now_s
        self._go.release()
        self._looked.acquire()


class Said:
    """In place of a link."""

    def __init__(self) -> None:
        self.heard_s, self.error = 0.0, None
        self.ends: list[str] = []

    def abort(self, reason: str) -> None:
        self.ends.append(reason)


def test_a_process_that_stood_still_looks_again_before_it_blames_others(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, said = Steps(monkeypatch), Said()
    watch = Watch(0.4)
    watch.add(said)  # type: ignore[arg-type]
    steps.look(0.0)
    steps.look(100.0)  # as after a night's sleep
    assert not said.ends
    said.heard_s = 100.01  # what had been said meanwhile has been read
    steps.look(100.05)
    assert not said.ends
    for now_s in (100.1, 100.2, 100.3, 100.4, 100.45):
        steps.look(now_s)
    assert said.ends == ["silent for 0.4 s"]
    watch.close()


class Echoes:
    """A handler that measures and is measured."""

    def __init__(self) -> None:
        self.echo = Echo()

    def buffer_for(self, header: Header) -> memoryview | None:
        return None

    def received(self, header: Header, payload: memoryview) -> bool:
        self.echo.take(header, payload)
        return True

    def lost(self, error: NetworkError) -> None:
        self.echo.lose(error)


@pytest.fixture
def echoes() -> Iterator[tuple[Echoes, Link, Link]]:
    sockets, here, there = socket.socketpair(), Echoes(), Echoes()
    near, far = Link(sockets[0], 1, 2, here, name="near"), Link(sockets[1], 2, 1, there, name="far")
    for handler, link in ((here, near), (there, far)):
        handler.echo.attach(link)
        link.start()
    yield here, near, far
    near.close()
    far.close()


def test_a_link_is_measured(echoes: tuple[Echoes, Link, Link]) -> None:
    here, near, _ = echoes
    speed = here.echo.measure()
    assert 0 < speed.latency_s < 1 and speed.bandwidth_bytes_s > 1e6
    assert near.stats.sent_frames >= 15 and near.stats.received_bytes == near.stats.sent_bytes


def test_measuring_ends_with_the_link(echoes: tuple[Echoes, Link, Link]) -> None:
    here, near, far = echoes
    far.close("it has gone")
    until(lambda: near.error is not None, "the loss")
    with pytest.raises(LinkLostError, match="it has gone"):
        here.echo.measure()
    assert not here.echo.takes(Header(Opcode.HIDDEN))
