"""Looks at a server: what is asked how often, servers that go and come back, pauses, cancelling."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cli.live.live_cases import CANCELLED, QUICK_S, connecting, fill
from steering import LONGEST_WAIT_S, until

from core.errors import AuthenticationError, UnavailableError, VRAMancerError
from vramancer.cli.live import watch
from vramancer.cli.live.connection import KeptClient
from vramancer.cli.live.look import ABSENT, SELDOM, Inquiry
from vramancer.cli.live.watch import Watcher

REFUSED = (401, b'{"error": {"message": "The API token is wrong."}}')


def asked(server: Any) -> Counter[str]:
    return Counter(path for _, path, _, _ in server.seen)


@contextmanager
def started(server: Any, interval_s: float = QUICK_S) -> Iterator[Watcher]:
    """A watcher at work; `changes` counts what it has told of."""
    watcher = Watcher(connecting(server), interval_s)
    watcher.start(lambda: None)
    try:
        yield watcher
    finally:
        watcher.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "vrm-dashboard"]


# -- a look ------------------------------------------------------------------------------------------------------------


def test_a_look_is_all_that_the_server_says(server: Any) -> None:
    fill(server)
    client = KeptClient(server.url, "secret")
    look = Inquiry(client, lambda: 100.0).look()
    client.close()
    assert look.url == server.url
    assert (look.at_s, look.started_s, look.hostname) == (100.0, 100.0 - 94_212.0, "rig")
    assert look.pipeline.model is not None and look.pipeline.model.name == "Qwen/Qwen3-14B"
    assert look.readings["cuda:2"].throttling == ("SW Power Cap",)
    assert look.tasks is not None and look.tasks.running[0].kind == "promote"
    assert look.nodes is not None and look.nodes.nodes[0].hostname == "rig"
    assert {seen[2] for seen in server.seen} == {"Bearer secret"}


def test_what_hardly_changes_is_asked_seldom(server: Any) -> None:
    fill(server)
    client = KeptClient(server.url, None)
    inquiry = Inquiry(client)
    for _ in range(SELDOM + 1):
        look = inquiry.look()
    client.close()
    every = asked(server)
    assert every["/api/pipeline/status"] == every["/api/gpu"] == every["/api/tasks"] == SELDOM + 1
    assert every["/api/nodes"] == every["/api/system"] == 2
    assert look.nodes is not None and look.hostname == "rig", "meanwhile it is what it was"


def test_what_the_server_does_not_have_is_asked_seldom_and_may_come(server: Any) -> None:
    fill(server)
    tasks = server.answers.pop("/api/tasks")
    client = KeptClient(server.url, None)
    inquiry = Inquiry(client)
    for _ in range(ABSENT):
        assert inquiry.look().tasks is None
    assert asked(server)["/api/tasks"] == 1
    server.answers["/api/tasks"] = tasks
    assert inquiry.look().tasks is not None
    client.close()


def test_what_may_not_be_asked_is_left_out_with_the_reason(server: Any) -> None:
    fill(server)
    server.answers["/api/gpu"] = (403, b'{"error": {"message": "not for viewers"}}')
    client = KeptClient(server.url, None)
    inquiry = Inquiry(client)
    look = inquiry.look()
    assert not look.readings
    assert look.left_out == {"/api/gpu": f"{server.url}: not for viewers"}
    fill(server)
    assert not inquiry.look().left_out
    client.close()


@pytest.mark.parametrize("path", ["/api/pipeline/status", "/api/queue/status", "/api/batcher/stats"])
def test_what_every_server_has_must_be_answered(server: Any, path: str) -> None:
    fill(server)
    del server.answers[path]
    with pytest.raises(VRAMancerError, match="not here"):
        Inquiry(KeptClient(server.url, None)).look()


# -- watching ----------------------------------------------------------------------------------------------------------


def test_the_first_look_must_succeed(server: Any) -> None:
    fill(server)
    server.answers["/api/pipeline/status"] = REFUSED
    with pytest.raises(AuthenticationError, match=r"The API token is wrong\."):
        Watcher(connecting(server), 1.0)
    server.server_close()
    with pytest.raises(UnavailableError, match="no answer from"):
        Watcher(connecting(server), 1.0)


def test_what_changes_is_seen(server: Any) -> None:
    fill(server, 0.0)
    with started(server) as watcher:
        first = watcher.seen.look.batcher.generated_tokens
        fill(server, 10.0)
        until(lambda: watcher.seen.look.batcher.generated_tokens > first, "a further look")
        until(lambda: (watcher.seen.lately.tokens_per_second or 0) > 0, "a rate")


def test_a_server_that_goes_away_is_waited_for(server: Any) -> None:
    fill(server)
    with started(server) as watcher:
        kept = dict(server.answers)
        server.answers["/api/queue/status"] = (503, b'{"error": {"message": "the server is stopping"}}')
        until(lambda: watcher.seen.trouble, "trouble")
        assert watcher.seen.trouble == f"{server.url}: the server is stopping"
        assert watcher.seen.look.pipeline.model is not None, "the last picture"
        server.answers |= kept
        until(lambda: not watcher.seen.trouble, "its return")


def test_a_server_set_up_anew_is_asked_with_its_new_token(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "REFUSED_S", QUICK_S)
    fill(server)
    token = "old"
    watcher = Watcher(lambda: KeptClient(server.url, token), QUICK_S)
    watcher.start(lambda: None)
    try:
        server.answers["/api/pipeline/status"] = REFUSED
        until(lambda: watcher.seen.trouble == f"{server.url}: The API token is wrong.", "the refusal")
        token = "new"
        until(lambda: server.seen[-1][2] == "Bearer new", "the new token")
        fill(server)
        until(lambda: not watcher.seen.trouble, "its return")
    finally:
        watcher.stop()


def test_a_server_that_refuses_the_token_is_asked_seldom(server: Any) -> None:
    """Wrong tokens are counted: asking every second would shut this address out."""
    waits: list[float | None] = []

    class Counting(Watcher):
        def _waited(self, wait_s: float) -> bool:
            waits.append(wait_s)
            return super()._waited(min(wait_s, QUICK_S))

    fill(server)
    watcher = Counting(connecting(server), QUICK_S)
    server.answers["/api/pipeline/status"] = REFUSED
    watcher.start(lambda: None)
    try:
        until(lambda: len(waits) > 3, "three refusals")
    finally:
        watcher.stop()
    assert waits[0] == QUICK_S
    assert all(wait is not None and wait >= watch.REFUSED_S / 2 for wait in waits[1:])


def test_a_pause_asks_nothing(server: Any) -> None:
    fill(server)
    with started(server) as watcher:
        watcher.pause()
        until(lambda: watcher.seen.paused, "the pause")
        before = len(server.seen)
        assert not threading.Event().wait(20 * QUICK_S)
        assert len(server.seen) == before
        watcher.pause()
        until(lambda: len(server.seen) > before, "a look")
        until(lambda: not watcher.seen.paused, "the end of the pause")
        watcher.pause()
        until(lambda: watcher.seen.paused, "a pause that the end of the program ends")


def test_stopping_does_not_wait_for_the_server(server: Any) -> None:
    fill(server)
    asking, over = threading.Event(), threading.Event()

    def hang(file: Any) -> None:
        asking.set()
        over.wait(LONGEST_WAIT_S)

    try:
        with started(server) as watcher:
            server.answers["/api/batcher/stats"] = (200, hang)
            assert asking.wait(LONGEST_WAIT_S)
            until(lambda: watcher.seen.asked_s is not None, "a look under way")
    finally:
        over.set()
    assert not watcher.seen.trouble, "nobody is told of what was ended"


def test_a_fault_of_ours_is_kept_for_the_screen(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(server)
    told = threading.Event()
    watcher = Watcher(connecting(server), QUICK_S)
    monkeypatch.setattr(watcher._trend, "add", lambda look: 1 / 0)
    watcher.start(told.set)
    until(lambda: watcher.failure is not None, "the fault")
    watcher.stop()
    assert isinstance(watcher.failure, ZeroDivisionError)
    assert told.is_set()


# -- cancelling --------------------------------------------------------------------------------------------------------


def cancelled(server: Any, request_id: str) -> str:
    said: list[str] = []
    with started(server) as watcher:
        watcher.cancel(request_id, said.append)
        until(lambda: said, "what came of it")
    return said[0]


def test_cancelling_asks_the_server(server: Any) -> None:
    fill(server)
    server.answers[CANCELLED] = (200, json.dumps({"cancelled": ["a"]}).encode())
    assert cancelled(server, "chatcmpl-a81f3f0a77f64d0c9d-0") == "chatcmpl-a81f3f0a77f64d0c9d-0 is cancelled."
    assert ("POST", CANCELLED, "Bearer secret", b"{}") in server.seen


def test_what_cannot_be_cancelled_says_why(server: Any) -> None:
    fill(server)
    server.answers[CANCELLED] = (403, b'{"error": {"message": "The server is in read-only mode."}}')
    said = cancelled(server, "chatcmpl-a81f3f0a77f64d0c9d-0")
    assert said == "chatcmpl-a81f3f0a77f64d0c9d-0 is not cancelled: The server is in read-only mode."


def test_an_odd_name_is_one_part_of_the_path(server: Any) -> None:
    fill(server)
    server.answers["/api/requests/a%2Fb%3Fc%20d/cancel"] = (200, b"{}")
    assert cancelled(server, "a/b?c d") == "a/b?c d is cancelled."
