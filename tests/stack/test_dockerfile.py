"""The image: what it is built from, who runs in it, how it is started, and how its health is asked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from doc_pages import blocks
from stack_files import BACKENDS, REPOSITORY, dockerfile, health_command, packages

from vramancer.main import as_command

ARGUMENTS, STAGES = dockerfile()
FINAL = STAGES[-1]


def test_the_base_is_pinned_to_a_day() -> None:
    names = {stage.name for stage in STAGES if stage.name}
    assert {stage.base for stage in STAGES} - names == {"${DEBIAN}"}
    assert re.fullmatch(r"debian:bookworm-\d{8}-slim(@sha256:[0-9a-f]{64})?", ARGUMENTS["DEBIAN"])


def test_it_runs_as_somebody_who_is_not_root() -> None:
    user = FINAL.last("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), user
    account = next(command for command in FINAL.all("RUN") if "useradd" in command)
    assert f"--uid {user.split(':')[0]} " in account and f"--gid {user.split(':')[1]} " in account
    positions = [instruction for instruction, _ in FINAL.instructions]
    assert "RUN" not in positions[positions.index("USER") :], "nothing is installed by that user"


def test_it_starts_the_api_without_a_shell_between() -> None:
    command = json.loads(FINAL.last("ENTRYPOINT")) + json.loads(FINAL.last("CMD"))
    assert command == ["python", "-m", "vramancer.main", "--api"]
    assert as_command(json.loads(FINAL.last("CMD"))) == ["serve"]


def test_it_keeps_and_writes_in_its_volumes_alone() -> None:
    volumes = json.loads(FINAL.last("VOLUME"))
    places = ("HOME", "HF_HOME", "VRM_RUNTIME_CACHE_DIR", "VRM_RUNTIME_STATE_DIR")
    for name in places:
        assert FINAL.environment[name].startswith(tuple(volumes)), name
    assert FINAL.environment["PYTHONSAFEPATH"] == "1", "a model's folder is no place to take code from"
    assert FINAL.last("WORKDIR") == "/models"


def test_each_backend_takes_torch_from_the_index_that_the_documents_name() -> None:
    install = next(command for stage in STAGES for command in stage.all("RUN") if "TORCH_INDEX" in command)
    indexes = dict(re.findall(r"(\w+)\) index=(\S+) ;;", install))
    assert set(indexes) == set(BACKENDS)
    pages = "".join((REPOSITORY / f"docs/{name}.md").read_text() for name in ("start", "troubleshooting"))
    documented = set(re.findall(r"https://download\.pytorch\.org/whl/[\w.]+", pages))
    assert set(indexes.values()) <= documented


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_another_backend_is_refused() -> None:
    install = next(command for stage in STAGES for command in stage.all("RUN") if "TORCH_INDEX" in command)
    choice = install[install.index("case ") : install.index("esac") + len("esac")]
    for backend, status in ((BACKENDS[0], 0), ("gpu", 1), ("", 1)):
        done = subprocess.run(
            ["sh", "-c", choice], env={"BACKEND": backend}, capture_output=True, text=True, check=False
        )
        assert done.returncode == status
        assert not status or "cuda, rocm or cpu" in done.stderr


def test_only_what_is_needed_is_sent_to_the_build() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "everything else stays outside: tokens, models, whole checkouts"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {name for stage in STAGES for rest in stage.all("COPY") for name in rest.split()[:-1] if "/" not in name}
    assert packages() == {"core", "vramancer"} | (packages() & {"dashboard"})
    assert packages() | {"README.md", "LICENSE", "pyproject.toml", "constraints.txt"} <= let_in
    assert copied - {".", "--from=build"} <= let_in
    assert not {rule for rule in let_in if rule.startswith((".", "*"))}


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server at a free port that answers /live with `status` and anything else with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/live" else 404)
            self.end_headers()

        def log_message(self, *values: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def health_status(port: int) -> int:
    """The exit status of the image's check. A proxy that is set must not be asked."""
    program, *rest = health_command()
    assert program == "python"
    environment = {"VRM_API_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run([sys.executable, *rest], env=environment, capture_output=True, check=False).returncode


@pytest.mark.parametrize(("answer", "status"), [(200, 0), (503, 1)])
def test_the_health_check_follows_live(answer: int, status: int) -> None:
    with answering(answer) as port:
        assert health_status(port) == status


def test_a_server_that_does_not_listen_is_not_well() -> None:
    with answering(200) as port:
        pass
    assert health_status(port) == 1


def test_the_page_names_the_variables_and_files_that_there_are() -> None:
    page = REPOSITORY / "docs" / "docker.md"
    text = page.read_text(encoding="utf-8")
    compose_text = "".join(path.read_text(encoding="utf-8") for path in REPOSITORY.glob("docker-compose*.yml"))
    used = set(re.findall(r"\$\{(\w+)[:}]", compose_text))
    assert used <= set(re.findall(r"\w+", text)), "every variable of the Compose files is explained"
    assert any("docker compose up" in block.text for block in blocks(page))
