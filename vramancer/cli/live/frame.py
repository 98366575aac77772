"""A whole screen: head, page, what there is to say, keys."""

from __future__ import annotations

from rich.text import Text

from vramancer.cli.live.canvas import Block, Canvas, stacked
from vramancer.cli.live.controls import DEVICES, OVERVIEW, PAGES, REQUESTS, Controls
from vramancer.cli.live.devices import devices_page
from vramancer.cli.live.overview import overview
from vramancer.cli.live.parts import gone, head
from vramancer.cli.live.requests import requests_page
from vramancer.cli.live.tiers import tiers_page
from vramancer.cli.live.watch import Seen

OLD = "dim"
_SAID_LINES = 4
"""Most that a message takes."""
_HELP = """\
1 overview, 2 devices and stages, 3 requests, 4 memory tiers
Tab, Shift-Tab      the next page, the one before
arrows, j, k        select a request; scroll, as do Page Up, Page Down, Home and End
c                   cancel the selected request, after a question
Space               ask the server no more; go on
?                   this page
q, Ctrl-C           leave

Speed     tokens a second in the last 5 seconds, what is predicted for what runs now, and the last minutes
Busy      share of the last 5 seconds in which a stage computed
Util      share of the time in which its driver saw a card work
Latency   half, 95 and 99 of a hundred were faster than that
In use    weights, KV and workspace, of what the server may take
Borrows   KV of this device that lies on another
Blocks    in and out since the server started
A grey picture is an old one: the server does not answer.\
"""


def frame(seen: Seen, controls: Controls, canvas: Canvas, rows: int, interval_s: float, now_s: float) -> list[Text]:
    """Of exactly so many rows; grey where it is an old picture."""
    old = gone(seen, interval_s, now_s)
    bottom = _bottom(seen, controls, canvas, old)
    top = head(seen, canvas, now_s)
    room = max(0, rows - len(top) - len(bottom))
    body = _body(seen, controls, canvas, room)[:room]
    if old:
        top, body = ([_grey(line) for line in lines] for lines in (top, body))
    empty = [Text()] * max(0, rows - len(top) - len(body) - len(bottom))
    lines = [canvas.cut(line, canvas.width) for line in (*top, *body, *empty, *bottom)]
    return lines[-rows:]  # where there is room for hardly anything, what is said and asked


def _body(seen: Seen, controls: Controls, canvas: Canvas, room: int) -> list[Text]:
    if controls.help:
        return _scrolled(_help(canvas), controls, room)
    if controls.page == OVERVIEW:
        return overview(seen, canvas, room)
    if controls.page == REQUESTS:
        lines, selected = requests_page(seen, canvas, controls.selected)
        return _around(lines, selected, room)
    blocks = devices_page(seen, canvas) if controls.page == DEVICES else tiers_page(seen, canvas)
    return _scrolled(_all_lines(blocks), controls, room)


def _help(canvas: Canvas) -> list[Text]:
    """What goes on in a further line begins below what it goes on from."""
    lines = []
    for line in _HELP.splitlines():
        margin = line.rindex("  ") + 2 if "  " in line else 0
        first, *more = Text(line[margin:]).wrap(canvas.console, max(8, canvas.width - margin)) or [Text()]
        lines += [Text.assemble(line[:margin], first), *(Text.assemble(" " * margin, each) for each in more)]
    return lines


def _all_lines(blocks: list[Block]) -> list[Text]:
    return stacked(blocks, sum(len(block.lines) + 1 for block in blocks))


def _scrolled(lines: list[Text], controls: Controls, room: int) -> list[Text]:
    """What is in the window, after an empty line; the scroll is kept within the page."""
    lines = [Text(), *lines]
    controls.scroll = max(0, min(controls.scroll, len(lines) - room))
    shown = lines[controls.scroll : controls.scroll + room]
    below = len(lines) - controls.scroll - room
    if below > 0 and shown:
        shown[-1] = Text(f"and {below + 1} more lines: Down", "dim")
    return shown


def _around(lines: list[Text], selected: int, room: int) -> list[Text]:
    """The window that has the selected line, as near to the beginning as it can be."""
    lines = [Text(), *lines]
    start = max(0, min(len(lines) - room, selected + 3 - room))
    return lines[start : start + room]


def _bottom(seen: Seen, controls: Controls, canvas: Canvas, old: str) -> list[Text]:
    """What has to be said or asked, and the keys."""
    said = []
    if old:
        said.append(canvas.text(old, "bold red"))
    if seen.paused:
        said.append(Text("paused: Space goes on", "bold yellow"))
    if controls.asking is not None:
        said.append(canvas.text(f"Cancel {controls.asking}? y: yes, any other key: no", "bold yellow"))
    elif controls.note:
        said.append(canvas.text(controls.note, "bold"))
    lines = [line for text in said for line in text.wrap(canvas.console, canvas.width)[:_SAID_LINES]]
    return [*lines, _keys(controls, canvas)]


def _keys(controls: Controls, canvas: Canvas) -> Text:
    """With their meanings, if there is room."""
    pages = [(str(number), name, number == controls.page and not controls.help) for number, name in PAGES.items()]
    keys = [*pages, ("?", "help", controls.help), ("q", "quit", False)]
    named = Text.assemble(*(_key(f"{key} {name}", here=here) for key, name, here in keys))
    named.rstrip()
    if named.cell_len > canvas.width:
        return canvas.cut(Text.assemble(*(_key(key, here=here) for key, _, here in keys)), canvas.width)
    return canvas.beside([named, Text("Space pauses", "dim")])


def _key(text: str, *, here: bool) -> Text:
    return Text(f"[{text}]", "bold") if here else Text(f" {text} ", "dim")


def _grey(line: Text) -> Text:
    return Text(line.plain, OLD)
