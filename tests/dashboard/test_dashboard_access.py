"""Who may see the dashboard and do what with it: sessions, and requests that another site may have made."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from boards import TOKEN, Board

from core.security.access import READING_METHODS, policy_of
from dashboard.board import SECURITY_HEADERS, STATIC
from dashboard.calls import CALLS, PREFIX
from dashboard.sessions import LONGEST_S, MAX_SESSIONS, SessionTable

HOST = "http://localhost"
ORIGIN = {"Origin": HOST}
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PUBLIC = {"/dashboard", "/dashboard/static/<path:name>"}
BY_TOKEN = {("/dashboard/session", "POST")}


def sign_in(board: Board, headers: dict[str, str] | None = None, **options: Any) -> tuple[Any, dict[str, str]]:
    """A client with its cookie, and the headers of its calls."""
    client = board.app.test_client()
    response = client.post("/dashboard/session", headers={**ORIGIN, **BEARER, **(headers or {})}, **options)
    assert response.status_code == 200, response.text
    return client, {**ORIGIN, "X-Dashboard-Session": response.get_json()["csrf"]}


def routes(board: Board) -> list[tuple[str, str]]:
    found = []
    for rule in board.app.url_map.iter_rules():
        if rule.rule.startswith("/dashboard"):
            found += [(rule.rule, method) for method in sorted((rule.methods or set()) - {"OPTIONS", "HEAD"})]
    return found


def url_of(rule: str) -> str:
    return rule.replace("<path:name>", "js/main.js").replace("<request_id>", "r").replace("<block>", "ab")


def test_what_is_public_is_written_down(board: Board) -> None:
    for rule, method in routes(board):
        endpoint = next(
            each.endpoint
            for each in board.app.url_map.iter_rules()
            if each.rule == rule and method in (each.methods or set())
        )
        declared = policy_of(board.app.view_functions[endpoint])
        assert declared is not None
        assert (declared.role is None) == (rule in PUBLIC), rule
        assert declared.session == (rule not in PUBLIC and (rule, method) not in BY_TOKEN), rule
        if method not in READING_METHODS:
            assert declared.role is not None


def test_every_other_route_needs_a_session_and_the_token_is_none(make_board: Callable[..., Board]) -> None:
    board = make_board(security__disable_rate_limit=True)
    for rule, method in routes(board):
        if rule in PUBLIC or (rule, method) in BY_TOKEN:
            continue
        for headers in ({}, BEARER, {"Cookie": "vramancer_session=made-up"}):
            response = board.app.test_client().open(url_of(rule), method=method, headers={**ORIGIN, **headers})
            assert response.status_code == 401, (rule, method)
            assert response.get_json()["error"]["code"] == "not_signed_in"


def test_a_session_opens_the_dashboard_and_nothing_else(board: Board) -> None:
    client, headers = sign_in(board)
    assert client.get("/dashboard/session").get_json() == {"csrf": headers["X-Dashboard-Session"], "version": "1.2.3"}
    assert client.get(f"{PREFIX}/api/models").status_code == 200
    for path in ("/api/models", "/api/pipeline/status", "/metrics"):
        assert client.get(path, headers=headers).status_code == 401, "cookies are nothing to the API"


def test_calls_have_the_policies_of_the_routes_that_they_lead_to(board: Board) -> None:
    endpoints = {
        (rule.rule, method): rule.endpoint for rule in board.app.url_map.iter_rules() for method in rule.methods or ()
    }
    for passed in CALLS:
        declared = policy_of(board.app.view_functions[endpoints[passed.rule, passed.method]])
        assert declared is not None
        assert (declared.role, declared.mutates) == (passed.role, passed.mutates), passed
        own = policy_of(board.app.view_functions[endpoints[PREFIX + passed.rule, passed.method]])
        assert own is not None
        assert (own.role, own.mutates, own.session, own.waits) == (passed.role, passed.mutates, True, True)
    listed = {(PREFIX + passed.rule, passed.method) for passed in CALLS}
    assert listed == {(rule, method) for rule, method in routes(board) if rule.startswith(PREFIX)}


@pytest.mark.parametrize("path", ["/metrics", "/api/generate", "/api/infer", "/../api/models", "/v1/../metrics", ""])
def test_nothing_else_is_passed_on(board: Board, path: str) -> None:
    client, headers = sign_in(board)
    assert client.get(PREFIX + path, headers=headers).status_code in (401, 404)


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer wrong"}, {"X-API-TOKEN": TOKEN[:-1]}])
def test_only_the_token_signs_in(board: Board, given: dict[str, str]) -> None:
    response = board.app.test_client().post("/dashboard/session", headers={**ORIGIN, **given})
    assert response.status_code == 401
    assert "Set-Cookie" not in response.headers
    assert len(board.dashboard.gate.sessions) == 0


def test_guessing_is_slowed_down_as_for_the_api(board: Board) -> None:
    client = board.app.test_client()
    wrong = {**ORIGIN, "Authorization": "Bearer wrong"}
    statuses = [client.post("/dashboard/session", headers=wrong).status_code for _ in range(25)]
    assert statuses[0] == 401
    assert statuses[-1] == 429
    assert sign_in(board), "the right token is not held up by that"


def test_the_cookie_is_out_of_reach(board: Board) -> None:
    client = board.app.test_client()
    response = client.post("/dashboard/session", headers={**ORIGIN, **BEARER})
    cookies = response.headers.getlist("Set-Cookie")
    assert [re.search(r"Path=([^;]+)", cookie)[1] for cookie in cookies] == ["/dashboard", "/socket.io"]  # type: ignore[index]
    for cookie in cookies:
        assert cookie.startswith("vramancer_session=")
        assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
        assert "Secure" not in cookie
        assert TOKEN not in cookie
    assert TOKEN not in response.text


@pytest.mark.parametrize("secure", ["scheme", "proxy"])
def test_over_https_the_cookie_stays_there(make_board: Callable[..., Board], secure: str) -> None:
    board = make_board(dashboard__origins=("https://gpu.example",))
    options: dict[str, Any] = {"base_url": "https://localhost"} if secure == "scheme" else {}
    origin = "https://localhost" if secure == "scheme" else "https://gpu.example"
    response = board.app.test_client().post("/dashboard/session", headers={"Origin": origin, **BEARER}, **options)
    assert response.status_code == 200
    assert all("Secure" in cookie for cookie in response.headers.getlist("Set-Cookie"))


def test_two_servers_of_a_machine_do_not_sign_each_other_out(board: Board) -> None:
    names = set()
    for port in (5000, 5001):
        url = f"http://localhost:{port}"
        response = board.app.test_client().post("/dashboard/session", headers={"Origin": url, **BEARER}, base_url=url)
        names.add(response.headers["Set-Cookie"].partition("=")[0])
    assert names == {"vramancer_session_5000", "vramancer_session_5001"}


FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "http://localhost:81"},
    {"Origin": HOST, "Sec-Fetch-Site": "cross-site"},
    {"Origin": HOST, "Sec-Fetch-Site": "same-site"},
    {"Origin": "http://[::1"},
    {},
]


@pytest.mark.parametrize("origin", FOREIGN)
def test_other_sites_change_nothing(board: Board, origin: dict[str, str]) -> None:
    client, headers = sign_in(board)
    sent = {"X-Dashboard-Session": headers["X-Dashboard-Session"], **origin}
    for path in ("/api/models/unload", "/v1/chat/completions"):
        response = client.post(PREFIX + path, headers=sent, json={})
        assert (response.status_code, response.get_json()["error"]["code"]) == (403, "wrong_origin"), origin
    assert client.delete("/dashboard/session", headers=sent).status_code == 403
    again = board.app.test_client().post("/dashboard/session", headers={**BEARER, **origin})
    assert again.status_code == 403, "nor does anybody sign in from there"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_read_nothing(board: Board, site: str) -> None:
    client, _ = sign_in(board)
    response = client.get("/dashboard/session", headers={"Sec-Fetch-Site": site})
    assert response.status_code == 403
    assert "csrf" not in response.get_json()
    assert client.get("/dashboard/session", headers={"Origin": "https://evil.example"}).status_code == 403


def test_other_sites_are_not_let_in_by_cors_either(make_board: Callable[..., Board]) -> None:
    board = make_board(api__cors_origins=("https://app.example",))
    client, _ = sign_in(board)
    response = client.get("/dashboard/session", headers={"Origin": "https://app.example"})
    assert response.status_code == 403
    assert "Access-Control-Allow-Credentials" not in response.headers


@pytest.mark.parametrize("csrf", [None, "", "wrong", "é"])
def test_every_change_names_its_session(board: Board, csrf: str | None) -> None:
    client, _ = sign_in(board)
    headers = {**ORIGIN} if csrf is None else {**ORIGIN, "X-Dashboard-Session": csrf}
    response = client.post(f"{PREFIX}/api/models/unload", headers=headers)
    assert (response.status_code, response.get_json()["error"]["code"]) == (403, "wrong_csrf")
    _, other = sign_in(board)
    assert client.post(f"{PREFIX}/api/models/unload", headers=other).status_code == 403, "another session's"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "192.168.1.7", ""])
def test_on_loopback_no_other_name_is_taken_for_this_machine(board: Board, host: str) -> None:
    for path in ("/dashboard", "/dashboard/static/js/main.js"):
        assert board.app.test_client().get(path, headers={"Host": host}).status_code == 403, path
    response = board.app.test_client().post(
        "/dashboard/session", headers={"Host": host, "Origin": f"http://{host}", **BEARER}
    )
    assert response.status_code == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:5000", "[::1]:5000", "127.0.0.2"])
def test_names_of_this_machine_are(board: Board, host: str) -> None:
    assert board.app.test_client().get("/dashboard", headers={"Host": host}).status_code == 200


def test_names_that_are_listed_are_ours(make_board: Callable[..., Board]) -> None:
    board = make_board(dashboard__origins=("https://gpu.example:443",))
    client = board.app.test_client()
    assert client.get("/dashboard", headers={"Host": "gpu.example"}).status_code == 200
    answer = client.post("/dashboard/session", headers={"Origin": "https://gpu.example", **BEARER})
    assert answer.status_code == 200, "a proxy that gives its own Host on"


def test_a_server_for_others_takes_any_name(make_board: Callable[..., Board]) -> None:
    board = make_board(api__host="0.0.0.0", api__token=TOKEN)
    assert board.app.test_client().get("/dashboard", headers={"Host": "gpu.lan:5000"}).status_code == 200


def test_signing_out_ends_the_session(board: Board) -> None:
    client, headers = sign_in(board)
    kept = client.get_cookie("vramancer_session", path="/dashboard")
    assert kept is not None
    response = client.delete("/dashboard/session", headers=headers)
    assert response.status_code == 204
    assert all("Max-Age=0" in cookie for cookie in response.headers.getlist("Set-Cookie"))
    client.set_cookie("vramancer_session", kept.value, path="/dashboard")
    assert client.get("/dashboard/session").status_code == 401


def test_sessions_end_by_themselves() -> None:
    now_s = [0.0]
    table = SessionTable(100.0, lambda: now_s[0])
    name, session = table.begin()
    now_s[0] = 90.0
    assert table.find(name) is session
    now_s[0] = 180.0
    assert table.find(name) is session, "used meanwhile"
    assert table.find(name, use=False) is session
    now_s[0] = 281.0
    assert table.find(name) is None
    assert len(table) == 0
    name, _ = table.begin()
    for _ in range(int(LONGEST_S / 90) + 5):
        now_s[0] += 90.0
        table.find(name)
    assert table.find(name) is None, "however much it is used"


def test_sessions_are_few_and_the_idlest_gives_way() -> None:
    table = SessionTable(100.0)
    first, _ = table.begin()
    second, _ = table.begin()
    for _ in range(MAX_SESSIONS - 2):
        table.begin()
    assert table.find(first) is not None
    table.begin()
    assert len(table) == MAX_SESSIONS
    assert table.find(first) is not None
    assert table.find(second) is None


def test_read_only_refuses_changes_and_lets_look_and_chat(make_board: Callable[..., Board]) -> None:
    board = make_board(security__read_only=True)
    client, headers = sign_in(board)
    for passed in CALLS:
        response = client.open(PREFIX + url_of(passed.rule), method=passed.method, headers=headers)
        assert (response.status_code == 403) is passed.mutates, passed
    told = client.get("/api/system", headers=BEARER).get_json()
    assert told["read_only"] is True


@pytest.mark.parametrize(
    "path", ["/dashboard", "/dashboard/static/js/main.js", "/dashboard/session", "/dashboard/static/x"]
)
def test_pages_load_nothing_from_elsewhere_and_run_no_text(board: Board, path: str) -> None:
    with board.app.test_client().get(path) as response:
        headers = response.headers
    if path != "/dashboard/session":  # which is refused before it comes to the dashboard
        for name, value in SECURITY_HEADERS.items():
            assert headers[name] == value
    policy = SECURITY_HEADERS["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


def test_pages_hold_no_secret_and_no_inline_code(board: Board) -> None:
    stranger = board.app.test_client().get("/dashboard")
    client, headers = sign_in(board)
    page = client.get("/dashboard")
    assert 'id="sign-in"' in stranger.text
    assert 'id="main"' in page.text
    for text in (stranger.text, page.text):
        assert TOKEN not in text
        assert headers["X-Dashboard-Session"] not in text
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|https?://", text)
    assert page.headers["Cache-Control"] == "no-store"


def test_files_are_asked_for_again_and_not_sent_again(board: Board) -> None:
    client = board.app.test_client()
    with client.get("/dashboard/static/js/main.js") as first:
        assert first.status_code == 200
    assert first.mimetype == "text/javascript"
    assert first.headers["Cache-Control"] == "no-cache"
    asked = {"If-None-Match": first.headers["ETag"]}
    with client.get("/dashboard/static/js/main.js", headers=asked) as again:
        assert again.status_code == 304
    for path in ("../board.py", "%2e%2e/board.py", "js", "js/none.js", "..%2fboard.py"):
        assert client.get(f"/dashboard/static/{path}").status_code in (401, 404), path


def test_scripts_make_no_html_from_text_and_name_no_other_host() -> None:
    for file in STATIC.rglob("*.js"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            file
        )
        hosts = set(re.findall(r"https?://[\w.-]+", text)) - {"http://www.w3.org"}
        assert not hosts, f"{file}: {hosts}"


def test_a_large_body_is_refused(make_board: Callable[..., Board]) -> None:
    board = make_board(api__max_body_bytes=1024)
    client, headers = sign_in(board)
    response = client.post(f"{PREFIX}/api/models/load", headers=headers, data=b"x" * 1025)
    assert response.status_code == 413
