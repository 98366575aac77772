"""What the pages show of a server, at every size, in which characters."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from scripts.captures import Terminal, example_facts
from scripts.live_example import Told, answers, seen_after
from vramancer.cli.live.answers import Nodes, Tasks
from vramancer.cli.live.canvas import Canvas
from vramancer.cli.live.controls import PAGES, Controls
from vramancer.cli.live.frame import frame
from vramancer.cli.live.look import Inquiry
from vramancer.cli.live.trend import Trend
from vramancer.cli.live.watch import Seen
from vramancer.cli.picture import Facts

WATCHED_S = 400
SIZES = [(80, 24), (120, 40), (60, 24), (200, 60)]
NO_MODEL = {
    "/api/pipeline/status": {
        "ready": False, "state": "no model is loaded", "model": None, "stages": [],
        "subsystems": {"engine": {"status": "error", "detail": "no engine: no model is loaded"}},
    },
    "/api/queue/status": {"running": 0, "waiting": 0, "unfinished": 0, "limit": 256, "requests": []},
    "/api/batcher/stats": {"generated_tokens": 0, "tokens_per_second": 0.0},
    "/api/gpu": {"devices": []},
    "/api/nodes": {"nodes": [{"hostname": "rig", "roles": ["api"], "devices": []}]},
    "/api/system": {"process": {"uptime_s": 4.0}},
    "/api/tasks": {"running": [], "recent": []},
}  # fmt: skip


@pytest.fixture(scope="module")
def example() -> Seen:
    return seen_after(example_facts(), WATCHED_S)


def seen_of(said: dict[str, Any], looks: int = 1) -> Seen:
    """Of a server that says the same at every look."""
    told, trend, now = Told("http://here:1"), Trend(), 0.0
    told.answers = said
    inquiry = Inquiry(told, lambda: now)  # type: ignore[arg-type]
    for second in range(looks):
        now = float(second)
        look = inquiry.look()
        lately = trend.add(look)
    return Seen(look, lately)


def drawn(seen: Seen, width: int = 80, height: int = 24, *, page: int = 1, **controls: Any) -> str:
    """The screen, as an emulated terminal shows it."""
    terminal = Terminal(width, height + 1)
    console = terminal.console()
    state = Controls(page=page, **controls)
    state.settle(seen)
    lines = frame(seen, state, Canvas(console, width), height, 1.0, seen.look.at_s)
    assert len(lines) == height
    assert max(line.cell_len for line in lines) <= width
    for line in lines:
        console.print(line, no_wrap=True)
    return terminal.text


def changed(seen: Seen, **fields: Any) -> Seen:
    return dataclasses.replace(seen, look=dataclasses.replace(seen.look, **fields))


# -- the first page ----------------------------------------------------------------------------------------------------


def test_everything_that_matters_is_on_the_first_page(example: Seen) -> None:
    shown = drawn(example)
    for line in (
        "Qwen/Qwen3-14B  degraded  up 1 d 2 h  14.8 B parameters in bfloat16\n",
        "http://127.0.0.1:5000  on rig  3 devices  context 32768\n",
        "degraded: disk: 192 MiB free\n",
        " tok/s (predicted 71.4)  ",
        "Batch   3 running of 64, 1 waiting of 256  last step 3  KV 62% in use\n",
        "p50 p95 p99  0.21 0.87 1.9 s  14 18 25 ms     4.3 19 41 s\n",
        "cuda:0   ███████▓▓▓▒░▄▞·  23.0 of 24.0             0-18   93%   96%  71°C  318 W\n",
        "cuda:2   ██████████▓▒░▄·  7.70 of 8.00    +1.20   32-39   71%   74%  83°C  172 W\n",
        "█ weights  ▓ KV in use  ▒ KV cached  ░ KV empty  ▄ workspace  ▞ lent  · free\n",
        "disk         ▒▒▒▒▒···················  41.0 of 200.0   34%      57236   4756\n",
        "promote 128 blocks from disk  running for 3.2 s\n",
        "load Qwen/Qwen3-32B  failed after 2.4 s  cuda:2 lacks 1.9 GiB.\n",
        "chatcmpl-5d0c7c7e9f6b4a53b8-0  running  1 min 15 s    1840        611\n",
        "chatcmpl-ee2d1b5a11f34b7a90-0  waiting       0.4 s   22051          0\n",
        "[1 overview] 2 devices  3 requests  4 memory  ? help  q quit  Space pauses\n",
    ):
        assert line in shown, line
    assert "completed" not in shown, "a task that is over and well is no news"
    assert "Nodes" not in shown, "there is one"


@pytest.mark.parametrize(("width", "height"), [*SIZES, (40, 12), (20, 5), (60, 3), (2, 2), (1, 1)])
@pytest.mark.parametrize("page", PAGES)
def test_every_page_fits_every_window(example: Seen, page: int, width: int, height: int) -> None:
    for controls in ({}, {"help": True}, {"note": "said"}, {"asking": "chatcmpl-1"}):
        drawn(example, width, height, page=page, **controls)


def test_a_narrow_window_has_the_same_without_what_drivers_say(example: Seen) -> None:
    shown = drawn(example, 60)
    for line in (
        "cuda:2   █████████▓▒░▄·  7.70 of 8.00    +1.20   32-39   71%\n",
        "p50 p95 p99  0.21 0.87 1.9 s  14 18 25 ms     4.3 19 41 s\n",
        "and 2 more requests: 3\n",
        "[1 overview] 2 devices  3 requests  4 memory  ? help  q quit\n",
    ):
        assert line in shown, line
    assert "°C" not in shown
    assert "▇" in shown, "the line of the last minutes"


def test_a_window_with_room_sets_the_parts_apart(example: Seen) -> None:
    assert "\n\n" not in drawn(example).rstrip("\n")
    assert "cached\nLatency" in drawn(example, 120, 40)
    assert "free\n\nTiers" in drawn(example, 120, 40)


def test_many_devices_and_requests_leave_room_for_each_other(example: Seen) -> None:
    pipeline, queue = example.look.pipeline, example.look.queue
    devices = tuple(msgspec.structs.replace(pipeline.memory.devices[0], name=f"cuda:{i}") for i in range(16))
    memory = msgspec.structs.replace(pipeline.memory, devices=devices)
    many = changed(
        example,
        pipeline=msgspec.structs.replace(pipeline, memory=memory),
        queue=msgspec.structs.replace(queue, requests=queue.requests * 5),
    )
    shown = drawn(many)
    assert "16 devices" in shown
    assert "and 9 more devices: 2\n" in shown
    assert "and 19 more requests: 3\n" in shown
    for text in ("cuda:6 ", "Tiers ", "Tasks\n", "Speed ", "Latency ", "chatcmpl-5d0c"):
        assert text in shown, text
    assert "cuda:15 " in drawn(many, 120, 60)


def test_requests_that_the_server_does_not_name_are_counted(example: Seen) -> None:
    queue = msgspec.structs.replace(example.look.queue, unfinished=9)
    unnamed = 9 - len(queue.requests)
    assert f"and {unnamed} more, which came later\n" in drawn(changed(example, queue=queue), 120, 60)
    assert "came later" not in drawn(example, 120, 60)
    many = msgspec.structs.replace(queue, requests=queue.requests * 5, unfinished=30)
    shown = drawn(changed(example, queue=many), 120, 40)
    (said,) = [line for line in shown.splitlines() if line.endswith("more requests: 3")]
    listed = sum(any(request.id in line for request in queue.requests) for line in shown.splitlines())
    assert said == f"and {30 - listed} more requests: 3"


def test_several_nodes_are_named(example: Seen) -> None:
    node = example.look.nodes.nodes[0]  # type: ignore[union-attr]
    other = msgspec.structs.replace(node, hostname="attic", roles=("worker",))
    shown = drawn(changed(example, nodes=Nodes((node, other))), 120, 40)
    assert "Nodes  rig (api, engine)  attic (worker)\n" in shown


# -- the other pages ---------------------------------------------------------------------------------------------------


def test_devices_and_stages(example: Seen) -> None:
    shown = drawn(example, 80, 40, page=2)
    for line in (
        "  █ weights 12.6  ▓ KV in use 5.22  ▒ KV cached 1.95  ░ KV empty 1.23\n",
        "  ▄ workspace 0.60  · free 0.30  borrows 1.20 elsewhere\n",
        "  utilisation 96%  71°C  318 of 350 W  PCIe 4 x16  other programs 0.60\n",
        "slowed down: SW Power Cap\n",
        "0 cuda:0    0-18  ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓·  93%        90%               12.6  11.7 ms\n",
        "2 cuda:2   32-39  ▓▓▓▓▓▓▓▓▓▓▓▓▓·····  71%        74%         2     5.50   8.9 ms\n",
        " tok/s lately, 71.4 predicted for what runs now\n",
        "rig    api, engine  cuda:0, cuda:1, cuda:2\n",
        "discovery of others: disabled\n",
    ):
        assert line in shown, line


def test_a_long_page_scrolls(example: Seen) -> None:
    first = drawn(example, page=2)
    assert "cuda:0  █" in first and "discovery" not in first
    assert "more lines: Down\n" in first
    last = drawn(example, page=2, scroll=999)
    assert "cuda:0  █" not in last and "discovery of others" in last
    assert "more lines" not in last


def test_requests_and_tasks(example: Seen) -> None:
    shown = drawn(example, page=3)
    for line in (
        "Requests  3 running, 1 waiting of 256  c: cancel\n",
        ">  chatcmpl-5d0c7c7e9f6b4a53b8-0  running  1 min 15 s    1840        611\n",
        "   chatcmpl-ee2d1b5a11f34b7a90-0  waiting       0.4 s   22051          0\n",
        "load Qwen/Qwen3-14B  completed after 41.3 s\n",
    ):
        assert line in shown, line
    second = drawn(example, page=3, selected="cmpl-0f7be31d8f6c4b7f8f-0")
    assert ">  cmpl-0f7be31d8f6c4b7f8f-0" in second
    assert second.count(">  ") == 1


def test_the_selected_request_is_in_the_window_and_what_follows_is_counted(example: Seen) -> None:
    request = example.look.queue.requests[0]
    requests = tuple(msgspec.structs.replace(request, id=f"chatcmpl-{number:02}") for number in range(32))
    many = changed(example, queue=msgspec.structs.replace(example.look.queue, requests=requests, unfinished=300))
    assert "chatcmpl-00" in drawn(many, page=3)
    last = drawn(many, page=3, selected="chatcmpl-31")
    assert ">  chatcmpl-31" in last
    assert "and 268 more, which came later\n" in last
    assert "chatcmpl-00" not in last


def test_tiers_moves_and_leases(example: Seen) -> None:
    shown = drawn(example, page=4)
    for line in (
        "KV on the devices  62% in use  ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓·········\n",
        "81600 tokens of 131200; 30400 kept for prompts that begin alike\n",
        "disk         ▒▒▒··············  41.0 of 200.0   52480   34%   2.9 GB/s  2.1 GB/s\n",
        "remote is not used: store.lan:6379 does not answer\n",
        "demotion               main memory  disk          57236\n",
        "eviction               disk         nowhere        4446\n",
        "cuda:0 lends cuda:2  1.20    1536  active  5 min 12 s\n",
    ):
        assert line in shown, line
    assert shown.count("57236") == 1, "both tiers tell of the same move"


def test_help_says_what_the_keys_do_at_every_width(example: Seen) -> None:
    for width in (60, 80, 120):
        shown = drawn(example, width, 40, help=True)
        assert "[? help]" in shown and "[1" not in shown
        assert "cancel the selected request" in shown
        assert "A grey picture is an old one" in shown


# -- other servers -----------------------------------------------------------------------------------------------------


def test_without_a_model() -> None:
    shown = drawn(seen_of(NO_MODEL))
    assert shown.startswith("no model  no model is loaded  up 4.0 s\nhttp://here:1\n")
    assert "error: engine: no engine: no model is loaded\n" in shown
    assert "Speed   0.0 tok/s" in shown
    assert "Requests  none\n" in shown
    assert "Devices" not in shown and "Latency" not in shown
    for page, said in ((2, "No device is in use"), (3, "0 running, 0 waiting"), (4, "No KV cache")):
        assert said in drawn(seen_of(NO_MODEL), page=page)
    assert "Tasks  none yet\n" in drawn(seen_of(NO_MODEL), page=3)


def older(facts: Facts) -> dict[str, Any]:
    """What a server of before latencies, readings and tasks says."""
    said = answers(facts, 0.0)
    said["/api/pipeline/status"] = facts.pipeline
    said["/api/batcher/stats"] = facts.batcher
    said["/api/gpu"] = {"devices": [{"name": "cuda:0"}]}
    return said


def test_what_an_older_server_does_not_say_is_left_out(example: Seen) -> None:
    seen = changed(seen_of(older(example_facts()), looks=3), tasks=None)
    shown = drawn(seen)
    assert "Latency" not in shown and "util" not in shown and "Tasks" not in shown
    assert "last step 0  KV 62% in use" in shown
    assert "cuda:1   " in shown
    for page in PAGES:
        assert "None" not in drawn(seen, page=page)
    assert "Tasks" not in drawn(seen, page=3)


def test_nothing_measured_yet(example: Seen) -> None:
    said = answers(example_facts(), 0.0)
    empty = {"count": 0, "p50": None, "p95": None, "p99": None}
    said["/api/batcher/stats"]["latency"] = {"first_token": empty, "between_tokens": empty, "request": empty}
    shown = drawn(seen_of(said))
    assert "p50 p95 p99  -            -               -\n" in shown
    assert "   -   96%" in shown, "how busy a stage is shows at the second look"
    assert "68.9 tok/s" in shown, "the server's own figure until then"


def test_a_server_at_rest_makes_nothing(example: Seen) -> None:
    said = answers(example_facts(), 0.0)
    said["/api/queue/status"] = {"running": 0, "waiting": 0, "limit": 256, "requests": []}
    assert "Speed   0.0 tok/s" in drawn(seen_of(said, looks=1)), "the server's figure is that of its last step"
    assert "Speed   0.0 tok/s" in drawn(seen_of(said, looks=5))


def test_what_could_not_be_asked_is_said(example: Seen) -> None:
    assert "not known: /api/tasks: no role for it\n" in drawn(
        changed(example, left_out={"/api/tasks": "no role for it"})
    )


@pytest.mark.parametrize(
    ("statuses", "said"), [((), "ready"), (("degraded",), "degraded"), (("error", "degraded"), "error")]
)
def test_the_worst_check_is_the_state(example: Seen, statuses: tuple[str, ...], said: str) -> None:
    checks = {"engine": {"status": "ok", "detail": ""}}
    checks |= {f"part{i}": {"status": status, "detail": "why"} for i, status in enumerate(statuses)}
    facts = example_facts()
    seen = seen_of(answers(dataclasses.replace(facts, pipeline={**facts.pipeline, "subsystems": checks}), 0.0))
    shown = drawn(seen)
    assert shown.startswith(f"Qwen/Qwen3-14B  {said}  up")
    assert shown.count(": why\n") == len(statuses)


def test_names_from_the_server_are_clean(example: Seen) -> None:
    said = answers(example_facts(), 0.0)
    said["/api/pipeline/status"]["model"] = {"name": "x\x1b[2J[red]y\nz", "dtype": "\x9b31m"}
    said["/api/queue/status"] = {
        "running": 1, "waiting": 0, "requests": [{"id": "a\x1b]0;t\x07b" + "c" * 300, "state": "run\rning"}],
    }  # fmt: skip
    said["/api/tasks"] = {"running": [{"id": "1", "kind": "load", "detail": "d\x1b[5m", "error": "e\ne"}]}
    seen = seen_of(said)
    for page in PAGES:
        shown = drawn(seen, page=page)
        assert shown.startswith("x[2J[red]y z  ")
    assert "a]0;tbccc" in drawn(seen, page=3)
    assert "load d[5m  running for 0.0 s  e e\n" in drawn(seen)


def test_plain_characters_where_there_are_no_others(example: Seen) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    console = Console(file=file, width=60, highlight=False)
    for page in PAGES:
        for line in frame(example, Controls(page=page), Canvas(console, 60), 24, 1.0, WATCHED_S):
            line.plain.encode("ascii")
    wide = frame(example, Controls(), Canvas(console, 80), 24, 1.0, WATCHED_S)
    shown = "\n".join(line.plain for line in wide)
    assert "cuda:0   #######===-_wL." in shown
    assert "71 C" in shown
    assert "# weights  = KV in use  - KV cached" in shown


def test_a_task_that_has_no_detail(example: Seen) -> None:
    tasks = msgspec.json.decode(
        b'{"running": [{"id": "1", "kind": "unload", "detail": null, "resource": null, "seconds": 61}]}', type=Tasks
    )
    assert "unload  running for 1 min 01 s\n" in drawn(changed(example, tasks=tasks))


# -- an old picture ----------------------------------------------------------------------------------------------------


def lines_of(seen: Seen, now_s: float, interval_s: float = 1.0) -> list[Any]:
    return frame(seen, Controls(), Canvas(Terminal(80).console(), 80), 24, interval_s, now_s)


def test_a_picture_is_grey_while_the_server_does_not_answer(example: Seen) -> None:
    gone = dataclasses.replace(example, trouble="no answer from http://127.0.0.1:5000: refused.")
    *picture, said, rest, keys = lines_of(gone, WATCHED_S + 12.0)
    assert f"{said.plain.strip()} {rest.plain}" == f"{gone.trouble} Waiting for it; this picture is 12.0 s old."
    assert str(said.style) == "bold red"
    assert {str(line.style) for line in picture if line.plain} == {"dim"}
    assert not any(line.spans for line in picture), "no colours"
    assert "q quit" in keys.plain
    assert "".join(line.plain for line in picture).startswith("Qwen/Qwen3-14B")


@pytest.mark.parametrize(
    ("waited_s", "interval_s", "grey"), [(2.9, 1.0, False), (3.1, 1.0, True), (3.1, 2.0, False), (4.1, 2.0, True)]
)
def test_a_server_that_takes_long_counts_as_gone(example: Seen, waited_s: float, interval_s: float, grey: bool) -> None:
    asked = dataclasses.replace(example, asked_s=WATCHED_S + 1.0)
    lines = lines_of(asked, WATCHED_S + 1.0 + waited_s, interval_s)
    assert ("no answer for" in lines[-2].plain) is grey
    assert (str(lines[0].style) == "dim") is grey


def test_a_paused_picture_says_so(example: Seen) -> None:
    lines = lines_of(dataclasses.replace(example, paused=True), WATCHED_S)
    assert lines[-2].plain == "paused: Space goes on"
    assert str(lines[0].style) != "dim"
