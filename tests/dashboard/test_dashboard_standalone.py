"""A dashboard in a process of its own, of a server that runs elsewhere."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from boards import TOKEN, Board, Browser, Viewer, served
from front_doors import front_door, serving
from plain_settings import make_settings
from steering import LONGEST_WAIT_S, until
from typer.testing import CliRunner

from core.config import iter_settings
from core.security.access import CallerLimits
from dashboard import Dashboard, HttpGateway
from dashboard.standalone import admission_of, create_standalone_app
from vramancer.cli import app
from vramancer.cli.web_dashboard import _bound

REPOSITORY = Path(__file__).parents[2]


@contextmanager
def alone(url: str, **settings: Any) -> Iterator[int]:
    loaded = make_settings(**settings)
    board = Dashboard(
        HttpGateway(url, TOKEN), loaded.dashboard, bound_to="127.0.0.1", max_body_bytes=loaded.api.max_body_bytes
    )
    made = create_standalone_app(board, TOKEN, CallerLimits(1000))
    with front_door(made, admission_of(made, board, TOKEN), live=board.live) as (port, _):
        yield port


@pytest.fixture
def server(board: Board) -> Iterator[int]:
    with serving(board.app) as port:
        yield port


def test_it_shows_another_server_and_passes_calls_on(server: int) -> None:
    with alone(f"http://127.0.0.1:{server}") as port:
        browser = Browser(port)
        whole = Viewer(browser).next("snapshot")
        assert whole["state"]["queue"]["running"] == 0
        assert whole["state"]["nodes"]["nodes"]
        status, _, body = browser.send("GET", "/dashboard/call/api/models")
        assert (status, json.loads(body)["object"]) == (200, "list")
        status, _, body = browser.send("POST", "/dashboard/call/api/models/unload")
        assert (status, json.loads(body)["error"]["code"]) == (503, "model_not_loaded")
        status, _, body = browser.send("POST", "/dashboard/call/api/requests/none/cancel", body="")
        assert status == 503


def test_it_is_guarded_like_the_other(server: int) -> None:
    with alone(f"http://127.0.0.1:{server}") as port:
        browser = Browser(port)
        assert browser.send("GET", "/dashboard/call/api/models", {})[0] == 401
        no_header = {"Origin": browser.origin, "Cookie": browser.cookie}
        assert browser.send("POST", "/dashboard/call/api/models/unload", no_header)[0] == 403
        assert browser.send("GET", "/dashboard", {"Host": "evil.example"})[0] == 403
        assert browser.send("GET", "/dashboard/session", {"Authorization": f"Bearer {TOKEN}"})[0] == 401
        wrong = {"Origin": browser.origin, "Authorization": "Bearer wrong"}
        statuses = [browser.send("POST", "/dashboard/session", wrong)[0] for _ in range(25)]
        assert (statuses[0], statuses[-1]) == (401, 429)
        assert browser.send("GET", "/made/up", {})[0] == 401
        assert browser.send("PUT", "/live", {})[0] in (401, 405)
        status, headers, _ = browser.send("GET", "/", {})
        assert (status, headers["Location"]) == (302, "/dashboard")


def test_a_server_that_is_gone_is_said_so(board: Board) -> None:
    with serving(board.app) as server:
        url = f"http://127.0.0.1:{server}"
    with alone(url) as port:
        browser = Browser(port)
        assert "no answer from" in Viewer(browser).next("snapshot")["state"]["trouble"]
        status, _, body = browser.send("GET", "/dashboard/call/api/models")
        assert (status, url in json.loads(body)["error"]["message"]) == (503, True)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for info in iter_settings():
        monkeypatch.delenv(info.env, raising=False)
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("core.logs.configure_logging", lambda settings: None)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--web", "--interval", "3"], "--interval"),
        (["--web"], "VRM_API_TOKEN"),
        (["--web", "--url", "http://gpu.example:5000"], "VRM_API_TOKEN"),
        (["--web", "--url", "ftp://x"], "--url"),
    ],
)
def test_what_cannot_start_says_why(flags: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["dashboard", *flags])
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.usefixtures("environment")
def test_a_generated_token_is_not_enough_to_let_others_in(tmp_path: Path) -> None:
    folder = tmp_path / "vramancer"
    folder.mkdir()
    (folder / "api-token").write_text("generated\n")
    (folder / "api-token").chmod(0o600)
    result = CliRunner().invoke(app, ["dashboard", "--web", "--dashboard-host", "0.0.0.0"])
    assert result.exit_code == 2
    assert "dashboard.host: 0.0.0.0 is reachable from other machines" in result.output


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        other_holds_it = pytest.raises(Exception, match=f"dashboard.port: cannot listen on 127.0.0.1:{port}")
        with other_holds_it:
            _bound("127.0.0.1", port)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_command(server: int, tmp_path: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "XDG_"))}
    process = subprocess.Popen(
        [
            sys.executable, "-m", "vramancer.main", "dashboard", "--web", "--url", f"http://127.0.0.1:{server}",
            "--dashboard-port", "0",
        ],
        env={**inherited, "HOME": str(tmp_path), "VRM_API_TOKEN": TOKEN},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    watchdog = threading.Timer(LONGEST_WAIT_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        found = re.search(r"at http://127\.0\.0\.1:(\d+)/dashboard", process.stdout.readline())
        assert found is not None, process.communicate()[1]
        viewer = Viewer(Browser(int(found[1])))
        assert viewer.next("snapshot")["state"]["queue"]["running"] == 0
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LONGEST_WAIT_S)
        assert process.returncode == 0, err
        assert TOKEN not in out + err
        assert "Traceback" not in err
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_server_itself_serves_it_unless_told_otherwise(make_board: Callable[..., Board]) -> None:
    from vramancer.server import _dashboard

    board = make_board()
    assert _dashboard(board.pipeline, TOKEN)[0] is not None
    off = make_settings(dashboard__enabled="0")
    board.pipeline.settings = board.pipeline.settings.model_copy(update={"dashboard": off.dashboard})
    assert _dashboard(board.pipeline, TOKEN)[0] is None
    with served(board) as (port, _):
        browser = Browser(port)
        until(lambda: browser.send("GET", "/live")[0] == 200, "it serves")
        status, _, body = browser.send("GET", "/", {"Accept": "application/json"})
        assert (status, "/dashboard" in json.loads(body)["places"]) == (200, True)
