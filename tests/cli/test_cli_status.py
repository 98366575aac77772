"""The picture of a server: what it shows, in which characters, and how it is drawn again."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from core.errors import ConfigError, UnavailableError
from scripts.captures import Terminal, example_facts
from vramancer.cli import app
from vramancer.cli.bars import GIB, Part, bar, flow, glyphs_for, legend, shares, size
from vramancer.cli.picture import Facts, count, device_parts, duration, picture
from vramancer.cli.status import watch_status

NO_MODEL = Facts(
    url="http://here:1",
    pipeline={
        "ready": False, "state": "no model is loaded", "model": None, "stages": [],
        "subsystems": {"engine": {"status": "error", "detail": "no engine: no model is loaded"}},
    },
    queue={"running": 0, "waiting": 0, "unfinished": 0, "limit": 256, "requests": []},
    batcher={"tokens_per_second": 0.0, "generated_tokens": 0, "prefix_hit_rate": 0.0},
    system={"process": {"uptime_s": 4.0}},
)  # fmt: skip


def drawn(facts: Facts, *, width: int = 120, **options: Any) -> str:
    terminal = Terminal(width)
    console = terminal.console(**options)
    console.print(picture(facts, console))
    return terminal.text


# -- the picture -------------------------------------------------------------------------------------------------------


def test_everything_that_runs_is_shown() -> None:
    shown = drawn(example_facts())
    for line in (
        "Qwen/Qwen3-14B  ready, up 1 d 2 h  http://127.0.0.1:5000",
        "14.8 B parameters in bfloat16, context 32768, loaded in 41.3 s",
        "degraded: disk: 192 MiB free",
        "23.0 of 24.0",
        "borrows 1.20 elsewhere",
        "layers 32-39",
        "2 layers streamed from main memory",
        "KV cache for 131200 tokens: 81600 in use, 30400 kept",
        "41.0 of 200.0 GiB  52480 blocks  34% hits   read 2.9 GB/s",
        "remote is not used: store.lan:6379 does not answer",
        "cuda:0 lends cuda:2  1.20 GiB  1536 blocks  active  for 5 min 12 s",
        "Requests  3 running, 1 waiting of 256",
        "68.9 tok/s (predicted 71.4)",
        "running  1 min 15 s   1840 prompt  611 generated",
        "waiting       0.4 s  22051 prompt    0 generated",
    ):
        assert line in shown
    assert "engine" not in shown  # which is well


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_broken_or_cut(width: int) -> None:
    shown = drawn(example_facts(), width=width)
    assert max(map(len, shown.splitlines())) <= width
    for figure in ("workspace 0.80", "KV empty 0.23", "23.0 of 24.0"):
        assert figure in shown
    if width >= 80:
        assert "read 2.9 GB/s\n" in shown
        assert " 611 generated\n" in shown


def test_without_a_model() -> None:
    shown = drawn(NO_MODEL)
    assert shown.startswith("no model  no model is loaded, up 4.0 s  http://here:1\n")
    assert "error: engine: no engine: no model is loaded" in shown
    assert "Requests  0 running, 0 waiting of 256" in shown
    assert "Memory" not in shown


def test_a_server_of_before_that_names_no_requests() -> None:
    facts = example_facts()
    queue = {name: value for name, value in facts.queue.items() if name != "requests"}
    assert "and 4 more" in drawn(dataclasses.replace(facts, queue=queue))


def test_more_requests_and_leases_than_there_is_room_for() -> None:
    facts = example_facts()
    queue = {**facts.queue, "requests": facts.queue["requests"] * 5, "unfinished": 300}
    memory = {**facts.pipeline["memory"], "leases": facts.pipeline["memory"]["leases"] * 10}
    shown = drawn(dataclasses.replace(facts, queue=queue, pipeline={**facts.pipeline, "memory": memory}))
    assert shown.count(" generated\n") == 8
    assert "and 292 more" in shown
    assert "and 2 more" in shown


def test_colours_unless_they_are_unwanted() -> None:
    for options, colored in (({}, True), ({"no_color": True}, False), ({"color_system": None}, False)):
        terminal = Terminal(80)
        console = terminal.console(**options)
        console.print(picture(example_facts(), console))
        assert ("\x1b[34m" in terminal.getvalue()) is colored


def test_plain_characters_where_there_are_no_others() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    console = Console(file=file, width=80, highlight=False)
    console.print(picture(example_facts(), console))
    file.flush()
    shown = file.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "cuda:0  ##########################===========----___wwLL..  23.0 of 24.0" in shown
    assert "# weights 12.6  = KV in use 5.22  - KV cached 1.95  _ KV empty 1.23" in shown


def test_names_from_the_server_are_clean() -> None:
    facts = example_facts()
    model = {**facts.pipeline["model"], "name": "x\x1b[2J[red]y"}
    terminal = Terminal(80)
    console = terminal.console()
    console.print(picture(dataclasses.replace(facts, pipeline={**facts.pipeline, "model": model}), console))
    assert "x[2J[red]y" in terminal.text
    assert "\x1b[2J" not in terminal.getvalue()


# -- bars --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amounts", "total", "cells", "given"),
    [
        ([50, 50], 100, 10, [5, 5]),
        ([1, 999], 1000, 10, [1, 9]),
        ([0, 1000], 1000, 10, [0, 10]),
        ([1, 1, 1], 3, 10, [4, 3, 3]),
        ([500], 1000, 10, [5]),
        ([1, 1, 998], 1000, 3, [1, 1, 1]),
        ([5], 0, 10, [0]),
    ],
)
def test_shares_are_whole_and_nothing_that_is_there_is_missing(
    amounts: list[int], total: int, cells: int, given: list[int]
) -> None:
    assert shares(amounts, total, cells) == given


def test_more_parts_than_cells() -> None:
    assert sum(shares([1] * 7, 7, 3)) == 3


def test_the_parts_of_a_device_are_its_limit() -> None:
    device = example_facts().pipeline["memory"]["devices"][0]
    blocks = {"with_memory": 8, "free": 6, "cached": 2}
    parts = {part.name: part.bytes for part in device_parts(device, blocks)}
    assert sum(parts.values()) == pytest.approx(device["limit_bytes"], abs=8)
    own = device["own_kv_bytes"]
    assert (parts["KV in use"], parts["KV cached"]) == (own // 4, own // 4)
    assert parts["KV empty"] == own - 2 * (own // 4)


def test_a_bar_shows_every_kind_its_own_way() -> None:
    terminal = Terminal(80)
    kinds = ("weights", "kv_used", "kv_cached", "kv_empty", "workspace", "lent", "free")
    parts = [Part(kind, GIB, kind) for kind in kinds]
    text = bar(parts, 7 * GIB, 7, glyphs_for(terminal.console())).plain
    assert len(set(text)) == len(text) == 7


def test_a_legend_leaves_out_what_is_nothing_or_less() -> None:
    """The bar gives a part below zero no cell, so the legend explains none."""
    parts = [Part("weights", 2 * GIB, "weights"), Part("workspace", -GIB, "workspace"), Part("lent", 0, "lent")]
    glyphs = glyphs_for(Terminal(80).console())
    assert bar(parts, 2 * GIB, 4, glyphs).plain == "████"
    assert [item.plain for item in legend(parts, glyphs)] == ["█ weights 2.00"]


def test_items_flow_into_lines() -> None:
    from rich.text import Text

    assert flow([Text("aaa"), Text("bbb"), Text("ccccc")], 8).plain == "aaa  bbb\nccccc"


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0.00"), (1, "<0.001"), (GIB // 100, "0.010"), (GIB, "1.00"), (24 * GIB, "24.0"), (1024 * GIB, "1024.0")],
)
def test_sizes(amount: int, text: str) -> None:
    assert size(amount) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (65, "1 min 05 s"), (7500, "2 h 05 min"), (90_000, "1 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts() -> None:
    assert [count(number) for number in (999, 870_000, 1_200_000, 7_615_616_512)] == ["999", "870 K", "1.2 M", "7.62 B"]


# -- drawn again -------------------------------------------------------------------------------------------------------


class Watched:
    """A server that changes from look to look; the user leaves after the last."""

    def __init__(self, *looks: Facts | Exception) -> None:
        self._looks = iter(looks)
        self.waits: list[float] = []
        self.left = len(looks)

    def look(self) -> Facts:
        self.left -= 1
        found = next(self._looks)
        if isinstance(found, Exception):
            raise found
        return found

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        if not self.left:
            raise KeyboardInterrupt


def at(uptime_s: float) -> Facts:
    return dataclasses.replace(NO_MODEL, system={"process": {"uptime_s": uptime_s}})


def test_the_picture_is_drawn_again_in_its_place() -> None:
    watched, terminal = Watched(at(1), at(2), at(3)), Terminal(80)
    watch_status(watched.look, terminal.console(), interval_s=0.5, wait=watched.wait)
    assert terminal.text.count("no model is loaded, up") == 1
    assert "up 3.0 s" in terminal.text
    assert [f"up {number}.0 s" in terminal.getvalue() for number in (1, 2, 3)] == [True] * 3
    assert watched.waits == [0.5] * 3


def test_a_server_that_goes_away_is_waited_for() -> None:
    terminal = Terminal(80)
    gone = UnavailableError("no answer from http://here:1: refused.")
    watched = Watched(at(1), gone)
    watch_status(watched.look, terminal.console(), wait=watched.wait)
    assert "up 1.0 s" in terminal.text
    assert "no answer from http://here:1" in terminal.text
    watched = Watched(at(1), gone, at(9))
    watch_status(watched.look, Terminal(80).console(), wait=watched.wait)
    assert watched.left == 0


def test_watching_takes_a_server_and_a_terminal() -> None:
    with pytest.raises(UnavailableError):
        watch_status(Watched(UnavailableError("gone")).look, Terminal(80).console())
    with pytest.raises(ConfigError, match="takes a terminal"):
        watch_status(Watched(at(1)).look, Console(file=io.StringIO()))


# -- the command -------------------------------------------------------------------------------------------------------


def answers(server: Any, facts: Facts) -> None:
    for path, body in (
        ("/api/pipeline/status", facts.pipeline),
        ("/api/queue/status", facts.queue),
        ("/api/batcher/stats", facts.batcher),
        ("/api/system", facts.system),
    ):
        server.answers[path] = (200, json.dumps(body).encode())


@pytest.mark.usefixtures("environment")
def test_status_draws_what_the_server_says(server: Any) -> None:
    answers(server, example_facts())
    result = CliRunner().invoke(app, ["status", "--url", server.url])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Qwen/Qwen3-14B  ready, up 1 d 2 h  {server.url}")
    assert {seen[2] for seen in server.seen} == {"Bearer secret"}


@pytest.mark.usefixtures("environment")
def test_json_is_what_the_server_says(server: Any) -> None:
    answers(server, example_facts())
    as_json = CliRunner().invoke(app, ["status", "--port", str(server.server_port), "--json"])
    assert json.loads(as_json.stdout) == json.loads(json.dumps(example_facts().pipeline))


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("flags", "status"), [((), 1), (("--watch",), 1), (("--watch", "--json"), 2)])
def test_status_without_a_server(server: Any, flags: tuple[str, ...], status: int) -> None:
    server.server_close()
    result = CliRunner().invoke(app, ["status", "--url", server.url, *flags])
    assert result.exit_code == (2 if flags else status)
    assert ("no answer from" in result.stderr) is not bool(flags)
