"""The server as a process: clients that vanish, Ctrl-C, tokens, metrics, swapping the model."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import TOKEN, Server, start_server, stop_server
from steering import LONGEST_WAIT_S, until

ESSAY = {"model": "vramancer-demo", "prompt": "Once upon a time", "max_tokens": 600, "ignore_eos": True}


def call(server: Server, method: str, path: str, body: Any = None, token: str = TOKEN) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONGEST_WAIT_S)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, json.loads(data) if "json" in (response.getheader("Content-Type") or "") else data


def leave_early(server: Server, body: dict[str, Any], *, read_bytes: int) -> None:
    """Open a request, read a little of its answer (0: not even that), and close the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONGEST_WAIT_S)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    if read_bytes:
        connection.getresponse().read(read_bytes)
    else:
        time.sleep(0.02)
    connection.close()


def wait_until_idle(server: Server, seconds: float = LONGEST_WAIT_S) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stats = call(server, "GET", "/api/batcher/stats")[1]
        if stats["running"] == stats["waiting"] == 0 and stats["kv_blocks"]["free"] == stats["kv_blocks"]["total"]:
            return stats  # type: ignore[no-any-return]
        time.sleep(0.05)
    raise AssertionError(f"still busy: {stats}")


def test_200_clients_that_vanish_leak_nothing(server: Server) -> None:
    def vanish(worker: int) -> None:
        for index in range(20):
            stream = (worker + index) % 3 > 0
            leave_early(server, ESSAY | {"stream": stream}, read_bytes=300 if stream else 0)

    workers = [threading.Thread(target=vanish, args=(number,)) for number in range(10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    stats = wait_until_idle(server)
    assert stats["failed_steps"] == 0
    assert call(server, "POST", "/v1/completions", ESSAY | {"max_tokens": 3})[0] == 200


def test_every_documented_route_answers(server: Server) -> None:
    for path in (
        "/v1/models", "/api/models", "/health", "/ready", "/live", "/metrics", "/api/pipeline/status", "/api/gpu",
        "/api/system", "/api/nodes", "/api/queue/status", "/api/batcher/stats",
    ):  # fmt: skip
        assert call(server, "GET", path)[0] == 200, path
    status, body = call(
        server, "POST", "/v1/batch/completions", {"prompts": ["The sky is", "A cat is"], "max_tokens": 4}
    )
    assert status == 200
    assert len(body["data"]) == 2
    status, body = call(server, "POST", "/api/generate", {"prompt": "The sky is", "max_tokens": 4})
    assert status == 200
    assert body["outputs"][0]["token_ids"]
    status, body = call(server, "POST", "/tokenize", {"prompt": "The sky is blue", "add_special_tokens": False})
    assert status == 200
    assert call(server, "POST", "/detokenize", {"tokens": body["tokens"]})[1]["prompt"] == "The sky is blue"
    status, body = call(server, "POST", "/api/infer", {"token_ids": [5, 6, 7]})
    assert status == 200


def test_a_load_is_reported(server: Server) -> None:
    """By what it came to; steps of a load that is over at once are not told (`tests/cli/test_server.py`)."""
    assert re.search(r"model loaded .*model=vramancer-demo .*seconds=[\d.]+", server.log.read_text())


def test_one_request_can_be_cancelled_by_its_id(server: Server) -> None:
    seen: list[bytes] = []

    def read() -> None:
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(ESSAY | {"stream": True}).encode(),
            {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json", "X-Request-ID": "cancel-me"},
        )
        with urllib.request.urlopen(request, timeout=LONGEST_WAIT_S) as response:
            seen.extend(response)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: seen, "the answer has begun")
    assert call(server, "POST", "/api/requests/cancel-me/cancel")[0] == 200
    reader.join(LONGEST_WAIT_S)
    assert not reader.is_alive()
    wait_until_idle(server)


def test_the_model_is_swapped_without_a_restart(server: Server) -> None:
    status, body = call(server, "POST", "/api/models/load", {"model": "vramancer-demo", "max_model_len": 64})
    assert status == 200, body
    assert call(server, "GET", "/api/pipeline/status")[1]["model"]["max_model_len"] == 64
    status, body = call(server, "POST", "/api/models/load", {"model": "no/such-model-anywhere"})
    assert status == 404
    assert call(server, "POST", "/v1/completions", ESSAY | {"max_tokens": 3})[0] == 200
    assert call(server, "POST", "/api/models/load", {"model": "vramancer-demo"})[0] == 200


def test_ctrl_c_lets_streams_finish_and_exits_cleanly(tmp_path: Path) -> None:
    server = start_server(tmp_path, "--devices", "cpu=128MiB", "--drain-timeout-s", "120")
    seen: list[bytes] = []

    def read() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONGEST_WAIT_S)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        body = json.dumps(ESSAY | {"stream": True, "max_tokens": 150})
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        while line := response.readline():
            seen.append(line)
        connection.close()

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: len(seen) >= 4, "the answer has begun")
    server.process.send_signal(signal.SIGINT)
    reader.join(LONGEST_WAIT_S)
    assert server.process.wait(LONGEST_WAIT_S) == 0, server.log.read_text()[-2000:]
    assert seen[-1].strip() == b"data: [DONE]" or b"data: [DONE]\n" in seen


def test_a_second_ctrl_c_exits_at_once(tmp_path: Path) -> None:
    server = start_server(tmp_path, "--devices", "cpu=128MiB", "--drain-timeout-s", "600")

    def ask() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # the server is killed in mid-answer
            call(server, "POST", "/v1/completions", ESSAY | {"max_tokens": 1500})

    client = threading.Thread(target=ask)
    client.start()
    until(lambda: call(server, "GET", "/api/batcher/stats")[1]["running"], "the answer has begun")
    server.process.send_signal(signal.SIGINT)
    until(lambda: "once more to exit at once" in server.log.read_text(), "it stops")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(LONGEST_WAIT_S) == 130
    client.join(LONGEST_WAIT_S)
    assert not client.is_alive()


def test_a_generated_token_is_private_and_shown_once(tmp_path: Path) -> None:
    server = start_server(tmp_path, "--devices", "cpu=128MiB", VRM_API_TOKEN="")
    try:
        files = [file for file in tmp_path.rglob("*token*") if file.is_file()]
        assert len(files) == 1
        assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
        token = files[0].read_text().strip()
        assert server.log.read_text().count(token) == 1
        assert call(server, "GET", "/v1/models", token=token)[0] == 200
        wrong = ("x" if token[0] != "x" else "y") + token[1:]
        assert call(server, "GET", "/v1/models", token=wrong)[0] == 401
    finally:
        stop_server(server)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "/no/such/directory"], "no/such"),
        (["--host", "0.0.0.0"], "token"),
        (["--devices", "cuda:7=1GiB"], "cuda:7"),
        (["--devices", "cpu=1MiB"], "lacks"),
    ],
)
def test_a_start_that_cannot_work_says_why_and_exits(tmp_path: Path, flags: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vramancer.main", "--api", "--port", "0", "--metrics-port", "0", *flags],
        capture_output=True, text=True, timeout=300, check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode not in (0, None)
    assert said in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
