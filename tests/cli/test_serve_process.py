"""`python -m vramancer.main --api` as users start it, with the demo model on two logical devices."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from core.config import ApiSettings, RuntimeSettings, Settings, iter_settings
from vramancer import server
from vramancer.cli import app

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "vramancer.main", "--api", *flags]


def environment(home: Path, **variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "XDG_"))}
    return {**inherited, "HOME": str(home), "VRM_MINIMAL_TEST": "1", **variables}


class Server:
    """A server process on free ports; `banner` is what it printed once it was ready."""

    def __init__(self, home: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            command("--port", "0", "--metrics-port", "0", "--log-json", "--drain-timeout-s", "120", *flags),
            env=environment(home),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.logged: list[str] = []
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()
        assert self.process.stdout is not None
        self.banner = ""
        for line in self.process.stdout:
            self.banner += line
            if line.startswith("    -d "):
                break
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.banner)
        assert found is not None, f"not started: {self.banner} {self.logged}"
        self.url = f"http://127.0.0.1:{found[1]}"

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.logged.append(line)

    def ask(self, path: str, token: str | None, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=120)

    def finish(self) -> int:
        return self.process.wait(timeout=120)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    yield running
    running.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands may run in this process: nothing is configured, and logging stays as it is."""
    for info in iter_settings():
        monkeypatch.delenv(info.env, raising=False)
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("core.logs.configure_logging", lambda settings: None)
    monkeypatch.setattr(server, "configure_logging", lambda settings: None)


def completion(**values: Any) -> dict[str, Any]:
    return {"model": "vramancer-demo", "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True, **values}


def test_start_answer_stop(started: Server, tmp_path: Path) -> None:
    token_file = tmp_path / ".local" / "state" / "vramancer" / "api-token"
    token = token_file.read_text().strip()
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    assert started.banner.count(token) == 1
    assert "vramancer-demo" in started.banner
    assert re.search(r"\n  cpu#0 +layers 0-\d, [\d.]+ MiB of weights, \d+ tokens of KV\n  cpu#1 ", started.banner)
    assert f"kept in {token_file}" in " ".join(started.banner.split())
    assert token not in "".join(started.logged)
    with started.ask("/live", None) as live, started.ask("/ready", None) as ready:
        assert (live.status, ready.status) == (200, 200)
    with pytest.raises(urllib.error.HTTPError) as refused, started.ask("/v1/models", "wrong"):
        pass
    assert refused.value.code == 401
    refused.value.close()
    with started.ask("/v1/completions", token, completion()) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 8

    streamed = started.ask("/v1/completions", token, completion(stream=True, max_tokens=400))
    assert streamed.readline().startswith(b"data: ")
    started.process.send_signal(signal.SIGINT)
    rest = streamed.read()
    streamed.close()
    assert rest.rstrip().endswith(b"data: [DONE]")
    assert b'"finish_reason":"length"' in rest.replace(b" ", b"")
    assert started.finish() == 0
    assert not [line for line in started.logged if "Traceback" in line]


def test_a_kept_token_is_not_shown_again(tmp_path: Path) -> None:
    folder = tmp_path / ".local" / "state" / "vramancer"
    folder.mkdir(parents=True)
    (folder / "api-token").write_text("kept-from-before-0123456789\n")
    (folder / "api-token").chmod(0o600)
    running = Server(tmp_path)
    try:
        assert "kept-from-before" not in running.banner
        assert str(folder / "api-token") in running.banner
        running.process.send_signal(signal.SIGTERM)
        assert running.finish() == 0
    finally:
        running.close()


def test_a_process_that_cannot_start_says_why_and_ends(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--port", "0", "--metrics-port", "0", "--model", "/nowhere/at/all"),
        env=environment(tmp_path),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "/nowhere/at/all" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (("--devices", "cuda:99=1GiB"), 1, "cuda:99 is not there"),
        (("--devices", "cpu=1MiB"), 1, "cpu lacks"),
        (("--host", "0.0.0.0"), 2, "VRM_API_TOKEN"),
        (("--prot", "1"), 2, "--prot"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_cannot_start_says_why(flags: tuple[str, ...], status: int, said: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--port", "0", "--metrics-port", "0", *flags])
    assert result.exit_code == status
    assert said in result.output


def test_a_port_in_use_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = Settings(api=ApiSettings(port=port, metrics_port=0), runtime=RuntimeSettings(state_dir=tmp_path))
        with pytest.raises(Exception, match=f"127.0.0.1:{port} is in use by another program"):
            server.serve(settings)


def test_stopping_while_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminated(self: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr("core.inference_pipeline.InferencePipeline.load", terminated)
    monkeypatch.setattr(server, "configure_logging", lambda settings: None)
    monkeypatch.setattr(server, "leave", lambda status: status)
    before = signal.getsignal(signal.SIGTERM)
    settings = Settings(api=ApiSettings(port=0, metrics_port=0), runtime=RuntimeSettings(state_dir=tmp_path))
    assert server.serve(settings) == 130
    assert "stopped before the server was ready" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("here")
def test_chat_in_this_process() -> None:
    arguments = ["run", "--devices", "cpu=512MiB,cpu=512MiB", "--max-tokens", "6", "--temperature", "0", "--local"]
    first = CliRunner().invoke(app, [*arguments, "Hello!"])
    assert first.exit_code == 0, first.output
    assert first.stdout.strip()
    assert CliRunner().invoke(app, arguments, input="Hello!\n").stdout == first.stdout, "what is piped in is a question"
