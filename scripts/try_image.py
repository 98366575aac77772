#!/usr/bin/env python3
"""Does the container serve? Starts the server of `docker-compose.yml` with the demo model, asks it, and stops it.

    python scripts/try_image.py [--backend cpu] [--no-build] [--compose "docker compose"]

Needs a container engine and Compose 2.24 or newer. All happens in a Compose project of its own, on free ports of this
machine, and its containers and volumes are removed at the end; the image stays. Prints what it saw. The exit status is
0 if the answer came, the container was shut in as the file says, and it ended as it should.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.smoke import check  # noqa: E402

PROJECT, SERVICE = "vramancer-try", "vramancer"
API_PORT, METRICS_PORT = 5030, 9108
START_S = 900
INSIDE = {
    "runs as somebody else than root": 'test "$(id -u)" != 0',
    "cannot write to the image": "! touch /opt/vramancer/x && ! touch /etc/x",
    "cannot gain privileges": "grep -q 'NoNewPrivs:.1' /proc/self/status && grep -q 'CapBnd:.0*$' /proc/self/status",
    "keeps its kernels in the cache": "test -n \"$(find /cache -name '*.so')\"",
    "is called well by its own check": None,
}
"""What has to hold in the container, by a command of a shell; None: asked of the engine."""


class Stack:
    """The Compose project, with the server published on two free ports of this machine."""

    def __init__(self, compose: list[str], folder: Path, backend: str, token: str) -> None:
        self.api_port, self.metrics_port = free_ports()
        override = folder / "override.yml"
        override.write_text(
            f'services:\n  {SERVICE}:\n    restart: "no"\n    ports: !override\n'
            f'      - "127.0.0.1:{self.api_port}:{API_PORT}"\n      - "127.0.0.1:{self.metrics_port}:{METRICS_PORT}"\n'
        )
        files = ["--file", str(ROOT / "docker-compose.yml"), "--file", str(override)]
        places = ["--project-name", PROJECT, "--project-directory", str(ROOT), "--env-file", os.devnull]
        self._command = [*compose, *places, *files]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "VRAMANCER_"))}
        self._environment = {**inherited, "VRM_API_TOKEN": token, "VRAMANCER_BACKEND": backend}

    def call(self, *arguments: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
        """Runs `docker compose …`. With `quiet` what it prints is caught."""
        return subprocess.run(
            [*self._command, *arguments], env=self._environment, text=True, capture_output=quiet, check=False
        )

    def state(self) -> dict[str, object]:
        """What Compose says of the server's container."""
        lines = self.call("ps", "--all", "--format", "json", SERVICE, quiet=True).stdout.splitlines()
        return dict(json.loads(lines[0]))


def free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def say(good: bool, what: str) -> bool:
    print(f"{'ok' if good else 'WRONG':<5} {what}")
    return good


def look_inside(stack: Stack) -> bool:
    """Whether the container is shut in, and kept what it compiled."""
    good = True
    for what, command in INSIDE.items():
        if command is None:
            holds = stack.state().get("Health") == "healthy"
        else:
            holds = stack.call("exec", "-T", SERVICE, "sh", "-c", command, quiet=True).returncode == 0
        good &= say(holds, f"the container {what}")
    return good


def try_it(stack: Stack, token: str) -> bool:
    """Ask the server that runs, and stop it."""
    good = check(f"http://127.0.0.1:{stack.api_port}", token)
    with urllib.request.urlopen(f"http://127.0.0.1:{stack.metrics_port}/metrics", timeout=30) as answer:
        good &= say(b"vramancer_infer_total" in answer.read(), "the metrics port, without a token")
    good &= look_inside(stack)
    stack.call("stop", SERVICE, quiet=True)
    status = stack.state().get("ExitCode")
    return good & say(status == 0, f"stopped with status {status}")


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="cpu", help="cuda, rocm or cpu (default)")
    parser.add_argument("--no-build", action="store_true", help="take the image that is there")
    parser.add_argument("--compose", default="docker compose", help="how Compose is called here")
    chosen = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    token = secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(shlex.split(chosen.compose), Path(folder), chosen.backend, token)
        try:
            build = "--no-build" if chosen.no_build else "--build"
            started = stack.call("up", "--detach", build, "--wait", "--wait-timeout", str(START_S), SERVICE)
            if started.returncode != 0:
                stack.call("logs", SERVICE)
                return 1
            return 0 if try_it(stack, token) else 1
        finally:
            stack.call("down", "--volumes", quiet=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
