"""Does this installation serve? Starts the server with the demo model, asks it once, and stops it.

    python -m tests.smoke [flags of `vramancer serve`]

Prints what it saw. The exit status is 0 if the answer came and the server ended as it should.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.request
from typing import Any

QUESTION, ANSWER = "What is the capital of France?", "Paris"
LONGEST_WAIT_S = 300.0


def start(home: str, token: str, flags: list[str]) -> tuple[subprocess.Popen[str], str]:
    """The server on free ports, and its address once it is ready."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "XDG_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "vramancer.main", "--api", "--port", "0", "--metrics-port", "0", *flags],
        env={**inherited, "HOME": home, "VRM_API_TOKEN": token}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://[\d.]+:\d+", line):
            return process, found[0]
    raise SystemExit(f"the server ended with status {process.wait()} before it was ready")


def get(url: str, token: str, body: dict[str, Any] | None = None) -> str:
    """What a route answers; an answer of 400 or more raises `urllib.error.HTTPError`."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=LONGEST_WAIT_S) as response:
        return str(response.read().decode())


def check(url: str, token: str) -> bool:
    """Whether probes, the dashboard, a question and the metrics give what they should."""
    for probe in ("/live", "/ready", "/health"):
        get(url + probe, token)
        print(f"ok    {probe}")
    page = get(f"{url}/dashboard", token)
    files = {*re.findall(r"/dashboard/static/[^\"]+", page), "/dashboard/static/js/pages/chat.js"}
    for file in files:
        get(url + file, token)
    print(f"ok    /dashboard and {len(files)} of its files")
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    answer = json.loads(get(f"{url}/v1/chat/completions", token, body))["choices"][0]["message"]["content"]
    print(f"{'ok' if ANSWER in answer else 'WRONG':<5} {QUESTION} {answer}")
    counted = re.search(r"^vramancer_generation_tokens_total\S* (\S+)", get(f"{url}/metrics", token), re.MULTILINE)
    print(f"{'ok' if counted else 'WRONG':<5} /metrics{f': {counted[1]} tokens generated' if counted else ''}")
    return ANSWER in answer and counted is not None


def main(flags: list[str]) -> int:
    """Returns the exit status."""
    token = secrets.token_urlsafe(16)
    with tempfile.TemporaryDirectory() as home:
        process, url = start(home, token, flags)
        try:
            good = check(url, token)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
    print(f"{'ok' if process.returncode == 0 else 'WRONG':<5} stopped with status {process.returncode}")
    return 0 if good and process.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
