"""`vramancer cluster status`: which machines serve together, as people read it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from vramancer.cli import app

GIB = 1 << 30


def node(name: str, **given: Any) -> dict[str, Any]:
    device = {"name": f"{name}/cpu", "used_bytes": GIB, "limit_bytes": 4 * GIB}
    plain = {
        "hostname": name, "address": "10.0.0.8", "status": "joined", "devices": [device], "layers": {},
        "link": {
            "latency_s": 0.00015, "bytes_per_second": 1.25e8, "interface": "eth0", "kind": "ethernet",
            "encrypted": False,
        },
        "lends_bytes": 0, "lent_bytes": 0,
    }  # fmt: skip
    return plain | given


FOUND: dict[str, Any] = {
    "nodes": [
        node("desk", link=None, layers={"desk/cpu": [0, 11]}),
        node("attic", status="leaving"),
        node("x[/red]\x1b[31m", devices=[]),
    ],
    "left_out": [{"name": "cellar", "address": "10.0.0.9", "reason": "it has VRAMancer 0.0.9"}],
    "discovery": {"status": "advertised", "address": "10.0.0.7", "port": 5040},
    "offer": {"tokens_per_second": {"1": 41.5, "16": 310.0}, "now": {"1": 40.0, "16": 204.0}, "devices": "cpu,a/cpu"},
}


def shown(server: Any, found: dict[str, Any], *flags: str) -> str:
    server.answers["/api/nodes"] = (200, json.dumps(found).encode())
    result = CliRunner().invoke(app, ["cluster", "status", "--url", server.url, *flags], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.usefixtures("environment")
def test_a_line_for_each_device(server: Any) -> None:
    text = shown(server, FOUND)
    lines = [line.split() for line in text.splitlines()]
    assert ["desk", "10.0.0.8", "this", "machine", "desk/cpu", "1", "GiB", "of", "4", "GiB", "0-11"] in lines
    assert [
        "attic",
        "(leaving)",
        "10.0.0.8",
        "150",
        "us,",
        "1.00",
        "Gbit/s,",
        "ethernet",
        "attic/cpu",
        *["1", "GiB", "of", "4", "GiB", "none"],
    ] in lines
    assert "x[/red]" in text and "none in use" in text and "\x1b" not in text, "names are text"
    assert "Workers are accepted at 10.0.0.7:5040.\n" in text
    assert '310 tokens/s of 16 streams, not 204: POST {"devices": "cpu,a/cpu"} to /api/pipeline/place' in text
    assert "left out: cellar (10.0.0.9): it has VRAMancer 0.0.9" in text


@pytest.mark.usefixtures("environment")
def test_encryption_and_memory_for_blocks_are_said(server: Any) -> None:
    """Where nobody offers any, there is no column for it."""
    plain = shown(server, FOUND)
    assert "encrypted" not in plain and "L4" not in plain
    link = node("attic")["link"] | {"encrypted": True}
    attic = node("attic", link=link, lends_bytes=8 * GIB, lent_bytes=3 * GIB)
    text = shown(server, FOUND | {"nodes": [node("desk", link=None), attic]})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any("for blocks (L4)" in line for line in lines)
    assert any(line.startswith("desk 10.0.0.8 this machine none desk/cpu") for line in lines)
    assert any("1.00 Gbit/s, ethernet, encrypted 3 GiB of 8 GiB attic/cpu" in line for line in lines)


@pytest.mark.usefixtures("environment")
def test_a_server_alone_says_how_others_join(server: Any) -> None:
    alone = {"nodes": [node("desk", link=None, address=None)], "left_out": [], "offer": None}
    text = shown(server, {**alone, "discovery": {"status": "disabled", "address": None, "port": None}})
    assert "accepts no workers; start it with --cluster-master" in text and "left out" not in text
    text = shown(server, {**alone, "discovery": {"status": "unavailable", "address": "10.0.0.7", "port": 5040}})
    assert "at 10.0.0.7:5040, which they have to be told" in text


@pytest.mark.usefixtures("environment")
def test_as_json(server: Any) -> None:
    assert json.loads(shown(server, FOUND, "--json")) == FOUND
