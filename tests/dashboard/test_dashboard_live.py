"""Live data behind the real front door: who may watch, what it costs, and viewers that do not behave."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from boards import Board, Browser, ScriptedGateway, Viewer, served
from steering import LONGEST_WAIT_S, until

from dashboard import live, poller
from dashboard.poller import THREAD_NAME

QUICK_S = 0.02


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """News come often, and more of them may wait for a viewer than would otherwise."""
    monkeypatch.setattr(live, "MAX_UNREAD", 10_000)
    monkeypatch.setattr(poller, "INTERVAL_S", QUICK_S)


@pytest.fixture
def gateway() -> ScriptedGateway:
    return ScriptedGateway({"/api/queue/status": {"running": 0}})


@pytest.fixture
def watched(make_board: Callable[..., Board], gateway: ScriptedGateway) -> Iterator[tuple[int, Board]]:
    board = make_board(gateway, dashboard__max_viewers=60)
    with served(board) as (port, _):
        yield port, board


def looking() -> bool:
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


@contextmanager
def waiting_for_news(viewer: Viewer) -> Iterator[None]:
    """Its request lies there meanwhile, and nobody reads what comes."""
    port = viewer.browser.port
    with socket.create_connection(("127.0.0.1", port), LONGEST_WAIT_S) as connection:
        head = [f"GET {viewer.own_path} HTTP/1.1", f"Host: 127.0.0.1:{port}"]
        head += [f"{name}: {value}" for name, value in viewer.browser.own.items()]
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        yield


def without(headers: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key != name}


def test_a_viewer_gets_the_whole_and_then_what_changes(watched: tuple[int, Board], gateway: ScriptedGateway) -> None:
    viewer = Viewer(Browser(watched[0]))
    whole = viewer.next("snapshot")
    assert whole["state"]["queue"] == {"running": 0}
    gateway.answers["/api/queue/status"] = {"running": 3}
    number = whole["number"]
    for _ in range(500):
        news = viewer.next("patch")
        assert news["number"] == number + 1, "none is missing"
        number = news["number"]
        if [["queue", "running"], 3] in news["patch"]:
            break
    else:
        pytest.fail("the change did not come")
    second = Viewer(Browser(watched[0])).next("snapshot")
    assert second["state"]["queue"] == {"running": 3}
    assert len(second["history"]) > 1, "with the curve so far"


def test_watching_begins_and_ends_the_looking(watched: tuple[int, Board], gateway: ScriptedGateway) -> None:
    port, board = watched
    browser = Browser(port)
    assert not looking()
    assert gateway.asked == []
    first, second = Viewer(browser), Viewer(browser)
    first.next("snapshot")
    second.next("snapshot")
    assert looking()
    first.say("1")
    second.next("patch")
    assert board.dashboard.live.num_viewers == 1
    second.say("1")
    until(lambda: not looking(), "nobody looks any more")
    asked = len(gateway.asked)
    time.sleep(5 * QUICK_S)
    assert len(gateway.asked) == asked
    assert Viewer(browser).next("snapshot")["state"]["queue"] == {"running": 0}, "and begins again"


def test_a_page_that_is_closed_makes_room_for_another(
    make_board: Callable[..., Board], gateway: ScriptedGateway
) -> None:
    board = make_board(gateway, dashboard__max_viewers=2)
    with served(board) as (port, _):
        for _ in range(3):
            viewers = [Viewer(Browser(port)) for _ in range(2)]
            for viewer in viewers:
                viewer.next("snapshot")
                assert viewer.say("1")[0] == 200
                assert viewer.browser.send("GET", viewer.own_path)[0] == 400, "it has gone"


def test_a_crowd_costs_the_api_what_one_costs(watched: tuple[int, Board], gateway: ScriptedGateway) -> None:
    port, board = watched
    browser = Browser(port)
    viewers = [Viewer(browser) for _ in range(50)]
    first = viewers[0].next("snapshot")["number"]
    for viewer in viewers[1:]:
        viewer.next("snapshot")
    assert board.dashboard.live.num_viewers == 50
    last = max(viewer.next("patch")["number"] for viewer in viewers[-3:])
    looks = gateway.asked.count("/api/queue/status")
    assert looks <= last + 2, f"{looks} looks for {last} messages to 50 viewers"
    assert last > first
    assert sum(thread.name == THREAD_NAME for thread in threading.enumerate()) == 1


def test_waiting_viewers_hold_no_thread(watched: tuple[int, Board], gateway: ScriptedGateway) -> None:
    port, board = watched
    browser = Browser(port)
    hub = board.dashboard.live
    viewers = [Viewer(browser) for _ in range(20)]
    for viewer in viewers:
        viewer.next("snapshot")
    with gateway.held(), ExitStack() as stack:
        for viewer in viewers:
            while hub._server.eio.sockets[viewer.sid].queue.qsize():
                viewer.fetch()
        before = threading.active_count()
        for viewer in viewers:
            stack.enter_context(waiting_for_news(viewer))
        until(lambda: len(hub._fetching) == 20, "all wait")
        assert threading.active_count() == before
        assert browser.send("GET", "/dashboard")[0] == 200


REFUSED = {
    "no session": (lambda own: without(own, "Cookie"), 401),
    "another session": (lambda own: {**own, "Cookie": "vramancer_session=x"}, 401),
    "no header": (lambda own: without(own, "X-Dashboard-Session"), 403),
    "a wrong header": (lambda own: {**own, "X-Dashboard-Session": "x"}, 403),
    "another origin": (lambda own: {**own, "Origin": "https://evil.example"}, 403),
    "another site": (lambda own: {**own, "Sec-Fetch-Site": "cross-site"}, 403),
    "another host": (lambda own: {**own, "Host": "evil.example", "Origin": "http://evil.example"}, 401),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nobody_else_may_watch(watched: tuple[int, Board], case: str) -> None:
    port, board = watched
    browser = Browser(port)
    change, status = REFUSED[case]
    answered, _, body = browser.send("GET", Viewer.path, change(browser.own))
    assert answered == status, body
    assert json.loads(body)["error"]["message"]
    viewer = Viewer(browser)
    assert browser.send("GET", viewer.own_path, change(browser.own))[0] == status
    assert browser.send("POST", viewer.own_path, change(browser.own), "3")[0] == status
    assert board.dashboard.live.num_viewers == 1


def test_to_connect_takes_an_origin(watched: tuple[int, Board]) -> None:
    browser = Browser(watched[0])
    sid = json.loads(browser.send("GET", Viewer.path, without(browser.own, "Origin"))[2][1:])["sid"]
    connect = f"{Viewer.path}&sid={sid}"
    assert browser.send("POST", connect, without(browser.own, "Origin"), "40")[0] == 403
    assert browser.send("POST", connect, None, "40")[0] == 200


def test_a_viewer_is_its_own_session_s(watched: tuple[int, Board]) -> None:
    viewer, other = Viewer(Browser(watched[0])), Browser(watched[0])
    status, _, body = other.send("GET", viewer.own_path)
    assert (status, json.loads(body)["error"]["code"]) == (400, "unknown_viewer")
    assert other.send("POST", viewer.own_path, body="1")[0] == 400
    assert viewer.next("snapshot")


@pytest.mark.parametrize(
    "body",
    [
        "4",
        '42["x",1]',
        "40/admin,",
        "2",
        "5",
        "6",
        "b4AAAA",
        '40{"a":1}',
        "x",
        "",
        "3\x1e40\x1e40",
        '451-["x"]',
        "d=3",
        "99",
    ],
)
def test_viewers_say_only_that_they_are_there(watched: tuple[int, Board], body: str) -> None:
    viewer = Viewer(Browser(watched[0]))
    status, _, answer = viewer.say(body)
    assert status == 400, answer
    assert viewer.say("40")[0] == 400, "it is connected already"
    assert viewer.say("3")[0] == 200
    assert viewer.next("snapshot")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "POST"])
def test_a_viewer_begins_with_get(watched: tuple[int, Board], method: str) -> None:
    browser = Browser(watched[0])
    assert browser.send(method, Viewer.path, body="40")[0] == 400


@pytest.mark.parametrize(
    "path",
    [
        "/socket.io/",
        "/socket.io/?EIO=3&transport=polling",
        "/socket.io/?EIO=4&transport=websocket",
        "/socket.io/?EIO=4&transport=polling&j=x",
    ],
)
def test_other_versions_and_transports_are_refused(watched: tuple[int, Board], path: str) -> None:
    browser = Browser(watched[0])
    headers = {**browser.own, "Connection": "Upgrade", "Upgrade": "websocket"} if "websocket" in path else None
    assert browser.send("GET", path, headers)[0] == 400
    assert watched[1].dashboard.live.num_viewers == 0


def test_bodies_are_small_and_have_their_time(make_board: Callable[..., Board], gateway: ScriptedGateway) -> None:
    board = make_board(gateway)
    with served(board, body_timeout_s=0.3) as (port, _):
        browser = Browser(port)
        viewer = Viewer(browser)
        assert browser.send("POST", viewer.own_path, body="3" * 2000)[0] == 413
        pieces = iter([b"3"] * 2000)
        assert browser.send("POST", viewer.own_path, body=pieces)[0] == 413
        slow = {**browser.own, "Content-Length": "5"}
        assert browser.send("POST", viewer.own_path, slow, b"")[0] == 408
        assert viewer.next("snapshot"), "and goes on"


def test_viewers_are_few(make_board: Callable[..., Board], gateway: ScriptedGateway) -> None:
    board = make_board(gateway, dashboard__max_viewers=2)
    with served(board) as (port, _):
        browser = Browser(port)
        first, second = Viewer(browser), Viewer(browser)
        status, headers, body = browser.send("GET", Viewer.path)
        assert (status, int(headers["Retry-After"]) > 0) == (429, True)
        assert "2 pages watch already" in json.loads(body)["error"]["message"]
        first.say("1")
        until(lambda: browser.send("GET", Viewer.path)[0] == 200, "there is room again")
        assert second.next("snapshot")


def test_a_viewer_that_does_not_fetch_is_dropped(watched: tuple[int, Board], monkeypatch: pytest.MonkeyPatch) -> None:
    port, board = watched
    monkeypatch.setattr(live, "MAX_UNREAD", 3)
    lazy, keen = Viewer(Browser(port)), Viewer(Browser(port))
    for _ in range(30):
        keen.next("patch")
    until(lambda: board.dashboard.live.num_viewers == 1, "the other is gone")
    assert lazy.browser.send("GET", lazy.own_path)[0] == 400
    assert keen.next("patch")


def test_a_viewer_that_never_reads_is_dropped(watched: tuple[int, Board], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer lies in the kernel; it does not ask again, so what there is for it piles up."""
    monkeypatch.setattr(live, "MAX_UNREAD", 3)
    port, board = watched
    viewer = Viewer(Browser(port))
    with waiting_for_news(viewer):
        until(lambda: board.dashboard.live.num_viewers == 0, "it is gone")


def test_who_leaves_is_gone_at_once(watched: tuple[int, Board], gateway: ScriptedGateway) -> None:
    port, board = watched
    viewer = Viewer(Browser(port))
    viewer.next("snapshot")
    hub = board.dashboard.live
    with gateway.held():  # no news for a while
        while hub._server.eio.sockets[viewer.sid].queue.qsize():
            viewer.fetch()
        with waiting_for_news(viewer):
            until(lambda: viewer.sid in hub._fetching, "it waits")
            assert hub.num_viewers == 1
        until(lambda: hub.num_viewers == 0, "it has left")


def test_one_waits_for_news_once(watched: tuple[int, Board], gateway: ScriptedGateway) -> None:
    port, board = watched
    viewer = Viewer(Browser(port))
    board.dashboard.live._fetching[viewer.sid] = object()
    status, _, body = viewer.browser.send("GET", viewer.own_path)
    assert (status, "waits for news already" in json.loads(body)["error"]["message"]) == (400, True)


def test_who_has_its_answer_may_ask_again_at_once(watched: tuple[int, Board], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its last request is not over yet, because sending is not."""
    port, board = watched
    viewer, hub = Viewer(Browser(port)), board.dashboard.live
    again: list[tuple[int, bytes]] = []
    answer = hub.answer

    async def lingering(scope: Any, environ: Any, body: bytes, send: Any) -> None:
        async def slow(message: dict[str, Any]) -> None:
            await send(message)
            if not again and message["type"] == "http.response.body":
                again.append((0, b""))
                status, _, said = await asyncio.to_thread(viewer.browser.send, "GET", viewer.own_path)
                again.append((status, said))

        await answer(scope, environ, body, slow)

    monkeypatch.setattr(hub, "answer", lingering)
    with waiting_for_news(viewer):
        until(lambda: len(again) == 2, "the second answer")
    assert again[1][0] == 200, again


def test_signing_out_ends_watching(watched: tuple[int, Board]) -> None:
    port, board = watched
    viewer = Viewer(Browser(port))
    viewer.next("snapshot")
    assert viewer.browser.send("DELETE", "/dashboard/session")[0] == 204
    until(lambda: board.dashboard.live.num_viewers == 0, "it is gone")
    assert viewer.browser.send("GET", viewer.own_path)[0] == 401


def test_a_server_that_stops_lets_viewers_go(
    make_board: Callable[..., Board], gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "INTERVAL_S", LONGEST_WAIT_S)  # after the first look a viewer's request lies there
    board = make_board(gateway)
    with served(board) as (port, door):
        viewer = Viewer(Browser(port))
        viewer.next("snapshot")
        gone: list[Any] = []

        def watch() -> None:
            try:
                while True:
                    gone.extend(viewer.fetch())
            except (AssertionError, OSError):
                return

        thread = threading.Thread(target=watch)
        thread.start()
        until(lambda: viewer.sid in board.dashboard.live._fetching, "its request")
        door.stop()
        thread.join(LONGEST_WAIT_S)
        assert not thread.is_alive()
        assert "1" in gone, "it was told"
    assert not looking()


def test_a_server_that_stops_takes_no_new_ones(make_board: Callable[..., Board], gateway: ScriptedGateway) -> None:
    board = make_board(gateway)
    app, held = board.app, threading.Event()
    original = app.wsgi_app

    def slow(environ: Any, start: Any) -> Any:
        if environ["PATH_INFO"] == "/dashboard/call/api/models":
            held.wait(LONGEST_WAIT_S)
        return original(environ, start)

    app.wsgi_app = slow  # type: ignore[method-assign]
    with served(board) as (port, door):
        browser = Browser(port)
        running = threading.Thread(target=browser.send, args=("GET", "/dashboard/call/api/models"))
        running.start()
        until(lambda: door._bridge.num_open, "a request runs")
        door.stop()
        until(lambda: browser.send("GET", Viewer.path)[0] == 503, "no new viewers")
        held.set()
        running.join(LONGEST_WAIT_S)
