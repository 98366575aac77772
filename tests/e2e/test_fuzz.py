"""The fuzz: what it sends follows from its seed, it sees what must not be, and a short run of it finds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fuzz import Findings, Sent, check, routes, trouble_of
from benchmarks.hostile import CHECKPOINTS, VALID, Requests, hostile_models

REPOSITORY = Path(__file__).parent.parent.parent
ERROR = b'{"error": {"message": "m", "type": "t", "param": null, "code": null}}'


def test_requests_follow_from_the_seed() -> None:
    rules = routes()
    one, same, other = (Requests(seed, "token", rules) for seed in (1, 1, 2))
    numbers = range(60)
    assert [one.number(n) for n in numbers] == [same.number(n) for n in reversed(numbers)][::-1]
    assert [one.number(n) for n in numbers] != [other.number(n) for n in numbers]


def test_every_route_is_asked_and_every_kind_of_request_is_sent() -> None:
    rules = routes()
    assert {rule for _, rule in rules} >= set(VALID), "what is valid is valid for a route that there is"
    requests, found, asked = Requests(0, "token", rules), set(), set()
    for number in range(1500):
        sent = requests.number(number)
        found.add(sent.kind)
        asked.add(sent.path)
    assert found == {"valid", "mutated", "any", "huge", "broken", "wrong token", "leaves", "elsewhere"}
    assert {rule for _, rule in rules if "<" not in rule} <= asked


def test_hostile_models_differ_from_the_demo_model(tmp_path: Path) -> None:
    made = hostile_models(tmp_path)
    assert len(made) == len(CHECKPOINTS)
    contents = {
        tuple(file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix != ".md") for folder in made
    }
    assert len(contents) == len(made)


@pytest.mark.parametrize(
    ("status", "kind", "data", "found"),
    [
        (200, "application/json", b"{}", None),
        (400, "application/json", ERROR, None),
        (503, "application/json", ERROR, None),
        (500, "application/json", ERROR, "500"),
        (504, "application/json", ERROR, "504"),
        (400, "text/html", b"<html>", "no error of the API's shape"),
        (404, "application/json", b'{"error": {"message": "m"}}', "has no"),
        (200, "text/event-stream", b"data: {}\n\ndata: [DONE]\n\n", None),
        (200, "text/event-stream", b"data: " + ERROR + b"\n\n", None),
        (200, "text/event-stream", b"data: {}\n\n", "ends in the middle"),
    ],
)
def test_answers_are_judged(status: int, kind: str, data: bytes, found: str | None) -> None:
    trouble = trouble_of(Sent("POST", "/v1/completions"), status, kind, data)
    assert trouble is None if found is None else found in (trouble or "")


@pytest.mark.parametrize(
    ("name", "value"), [("requests", 1), ("sequences", 1), ("blocks", 1), ("leases", 1), ("threads", 40), ("files", 40)]
)
def test_what_is_left_is_a_failure(name: str, value: int) -> None:
    before = {"threads": 20, "files": 20, "requests": 0, "sequences": 0, "blocks": 0, "leases": 0}
    findings = Findings()
    check(before, before | {name: value}, findings)
    assert len(findings.failures) == 1
    assert name in findings.failures[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it counts the server's open files")
def test_a_short_run_finds_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VRM_")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fuzz", "--requests", "300", "--seed", "3"],
        capture_output=True, text=True, timeout=500, check=False, cwd=REPOSITORY, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n0 failures\n" in done.stdout
