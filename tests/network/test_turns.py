"""Who reads a link: its own thread, or whoever waits for what comes over it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from steering import LONGEST_WAIT_S, until

from core.errors import LinkLostError, NetworkError
from core.network import turns
from core.network.flow import WINDOW_BYTES
from core.network.frames import Header, Opcode
from core.network.link import Link
from core.network.sockets import Source
from core.network.turns import Turn


class Waits:
    """A handler that others wait for: what has come, by step, and which thread read it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.came: dict[int, threading.Thread] = {}
        self.error: NetworkError | None = None

    def buffer_for(self, header: Header) -> memoryview | None:
        return None

    def received(self, header: Header, payload: memoryview) -> bool:
        with self.changed:
            self.came[header.step] = threading.current_thread()
            self.changed.notify_all()
        return True

    def lost(self, error: NetworkError) -> None:
        with self.changed:
            self.error = error
            self.changed.notify_all()


class Ends:
    """Two links; threads wait at the near one."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.here, self.there = Waits(), Waits()
        self.near = Link(ours, 1, 2, self.here, name="near")
        self.far = Link(theirs, 2, 1, self.there, name="far")
        self.near.start()
        self.far.start()
        self.threads: list[threading.Thread] = []

    @property
    def borrower(self) -> int | None:
        return self.near._turn._borrower

    def wait(self, step: int, borrows: bool) -> threading.Thread:
        """A thread that waits for a step, once it does so, reading or not."""
        waiting = self.near._turn._waiting
        is_over = partial(lambda: step in self.here.came or self.here.error is not None)
        self.threads.append(threading.Thread(target=self.near.wait_for, args=(is_over, self.here.changed)))
        self.threads[-1].start()
        until(lambda: self.near._turn._waiting > waiting, "it waits")
        if borrows:
            until(lambda: self.borrower == self.threads[-1].ident and not self.near._turn._is_read, "it reads")
        return self.threads[-1]

    def join(self) -> None:
        for thread in self.threads:
            thread.join(LONGEST_WAIT_S)
            assert not thread.is_alive()

    def close(self) -> None:
        self.near.close()
        self.far.close()
        self.join()


@pytest.fixture
def ends() -> Iterator[Ends]:
    pair = Ends()
    yield pair
    pair.close()


def test_who_waits_reads_what_it_waits_for(ends: Ends) -> None:
    for step in range(3):
        thread = ends.wait(step, borrows=True)
        ends.far.send(Opcode.RESULTS, [b"result"], step=step)
        ends.join()
        assert ends.here.came[step] is thread
    assert ends.borrower is None


def test_who_waits_reads_what_is_for_others_too(ends: Ends) -> None:
    thread = ends.wait(7, borrows=True)
    ends.far.send(Opcode.RESULTS, [bytes(100_000)], step=5)
    ends.far.send(Opcode.RESULTS, step=7)
    ends.join()
    assert ends.here.came == {5: thread, 7: thread}


def test_while_several_wait_the_links_own_thread_reads(ends: Ends) -> None:
    first = ends.wait(1, borrows=True)
    ends.wait(2, borrows=False)
    ends.far.send(Opcode.RESULTS, step=1)
    until(lambda: 1 in ends.here.came, "the first")
    assert ends.here.came[1] is first
    ends.wait(3, borrows=False)
    for step in (2, 3):
        ends.far.send(Opcode.RESULTS, step=step)
    ends.join()
    assert {ends.here.came[step].name for step in (2, 3)} == {"vrm-link-near"}


def test_what_comes_while_nobody_waits_is_read_all_the_same(ends: Ends) -> None:
    ends.wait(1, borrows=True)
    ends.far.send(Opcode.RESULTS, step=1)
    ends.join()
    ends.far.send(Opcode.RESULTS, step=2)
    until(lambda: 2 in ends.here.came, "what nobody waits for")
    assert ends.here.came[2].name == "vrm-link-near"


def test_what_comes_another_way_is_told_by_wake(ends: Ends) -> None:
    ends.wait(1, borrows=True)
    ends.here.came[1] = threading.current_thread()
    ends.near.wake()
    ends.join()
    ends.near.wake()  # whom nobody hears
    ends.far.send(Opcode.RESULTS, step=2)
    until(lambda: 2 in ends.here.came, "the link goes on")


@pytest.mark.parametrize(
    "end", [lambda ends: ends.far.close("it drains"), lambda ends: ends.near.abort("silent"), Ends.close]
)
def test_who_waits_hears_of_the_end(ends: Ends, end: Callable[[Ends], None]) -> None:
    ends.wait(1, borrows=True)
    ends.wait(2, borrows=False)
    end(ends)
    ends.join()
    assert isinstance(ends.here.error, LinkLostError)
    assert not ends.near.wait_for(lambda: False, ends.here.changed, 0.0)


def test_who_has_waited_long_enough_reads_no_more(ends: Ends) -> None:
    assert not ends.near.wait_for(lambda: False, ends.here.changed, 0.001)
    ends.far.send(Opcode.RESULTS, step=1)
    assert ends.near.wait_for(lambda: 1 in ends.here.came, ends.here.changed, LONGEST_WAIT_S)


def test_who_waits_for_credit_has_the_link_read(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the link's own thread has just stood back, and would do so for long."""
    ends.wait(1, borrows=True)
    monkeypatch.setattr(turns, "_STANDS_BACK_S", 1e6)
    ends.far.send(Opcode.RESULTS, step=1)
    ends.join()

    def send() -> None:
        for _ in range(4):
            ends.near.send(Opcode.KV_PAGES, [bytes(WINDOW_BYTES // 2)])

    ends.threads.append(threading.Thread(target=send))
    ends.threads[-1].start()
    ends.join()


def looks(turn: Turn) -> bool:
    return turn._looks


def test_looking_costs_little_where_nothing_comes_as_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_CORES", 2)
    ours, theirs = socket.socketpair()
    turn = Turn(ours, Source(ours))
    assert not looks(turn)
    turn._slept(turns._LOOKS_S / 2)
    assert looks(turn)
    turn._slept(turns._LOOKS_S * 2)
    assert not looks(turn)
    turn._slept(0.0)
    assert turn._look() is None and not looks(turn), "nothing came"
    for _ in range(turns._SKIPS):
        turn._slept(0.0)
        assert not looks(turn)
    turn._slept(0.0)
    theirs.send(b"there")
    assert looks(turn) and turn._look() == (False, True)
    monkeypatch.setattr(turns, "_CORES", 1)
    turn._slept(0.0)
    assert not looks(turn), "the other end needs the only core"
    turn.close()
    ours.close()
    theirs.close()
