"""What several pages show: the head, device bars, requests, tasks."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from vramancer.cli.bars import Part, bar, legend, size
from vramancer.cli.live.answers import DeviceMemory, Request, Task, fields_of
from vramancer.cli.live.canvas import Canvas, Column, Flexible
from vramancer.cli.live.figures import percent
from vramancer.cli.live.watch import Seen
from vramancer.cli.picture import count, device_parts, duration

GONE_S = 3.0
"""A server that takes longer than this to answer, or than two intervals, counts as gone."""

_COLORS = {"ok": "green", "degraded": "yellow", "error": "red"}


def head(seen: Seen, canvas: Canvas, now_s: float) -> list[Text]:
    """Model, state, for how long; where."""
    look = seen.look
    pipeline, model = look.pipeline, look.pipeline.model
    name = canvas.cut(canvas.text(model.name if model else "no model", "bold"), max(16, canvas.width // 2))
    items = [name, _state(seen, canvas)]
    if look.started_s is not None:
        items.append(Text(f"up {duration(now_s - look.started_s)}"))
    if model:
        items.append(canvas.text(f"{count(model.parameters)} parameters in {model.dtype}"))
    number = len(pipeline.memory.devices)
    where = [canvas.text(look.url, "dim")]
    if look.hostname:
        where.append(canvas.text(f"on {look.hostname}", "dim"))
    if number:
        where.append(Text(f"{number} device{'s' if number > 1 else ''}", "dim"))
    if model:
        where.append(Text(f"context {model.max_model_len}", "dim"))
    return [canvas.beside(items), canvas.beside(where)]


def _state(seen: Seen, canvas: Canvas) -> Text:
    """Ready, degraded, or why neither."""
    pipeline = seen.look.pipeline
    if not pipeline.ready:
        return canvas.text(pipeline.state, "yellow")
    worst = max((check.status for check in pipeline.subsystems.values()), key=list(_COLORS).index, default="ok")
    return canvas.text("ready" if worst == "ok" else worst, _COLORS[worst])


def troubles(seen: Seen, canvas: Canvas) -> list[Text]:
    """Checks that are not ok, what the plan says of itself, and what could not be asked."""
    pipeline = seen.look.pipeline
    lines = [
        canvas.text(f"{check.status}: {name}: {check.detail}", _COLORS.get(check.status, ""))
        for name, check in pipeline.subsystems.items()
        if check.status != "ok"
    ]
    lines += [canvas.text(f"note: {note}", "dim") for note in pipeline.notes]
    lines += [canvas.text(f"not known: {path}: {why}", "dim") for path, why in seen.look.left_out.items()]
    return [canvas.cut(line, canvas.width) for line in lines]


def gone(seen: Seen, interval_s: float, now_s: float) -> str:
    """Why the picture is an old one; empty if it is not."""
    age = f"this picture is {duration(max(0.0, now_s - seen.look.at_s))} old"
    if seen.trouble:
        return f"{seen.trouble} Waiting for it; {age}."
    if seen.asked_s is not None and now_s - seen.asked_s > max(GONE_S, 2 * interval_s):
        return f"no answer for {duration(now_s - seen.asked_s)}; {age}."
    return ""


def parts_of(seen: Seen, device: DeviceMemory) -> list[Part]:
    """What its memory is, in order."""
    blocks = seen.look.pipeline.memory.kv_blocks
    return device_parts(fields_of(device), fields_of(blocks) if blocks else {})


def bars(seen: Seen, canvas: Canvas, title: str, *, least: int, most: int) -> Flexible:
    """A bar for each device."""
    devices = seen.look.pipeline.memory.devices
    return Flexible(
        title,
        lambda width: [bar(parts_of(seen, device), device.limit_bytes, width, canvas.glyphs) for device in devices],
        least,
        most,
    )


def key_to_bars(seen: Seen, canvas: Canvas) -> list[Text]:
    """What the bars' characters mean, of those that are there."""
    found: dict[str, Text] = {}
    for device in seen.look.pipeline.memory.devices:
        for part in parts_of(seen, device):
            if part.bytes > 0 and part.kind not in found:
                found[part.kind] = legend([part], canvas.glyphs)[0]
    kinds = ("weights", "kv_used", "kv_cached", "kv_empty", "workspace", "lent", "free")
    return [_without_size(found[kind]) for kind in kinds if kind in found]


def _without_size(item: Text) -> Text:
    return item[: item.plain.rindex(" ")]


def used_of(used: int, total: int) -> Text:
    return Text(f"{size(used)} of {size(total)}")


def request_columns(requests: Sequence[Request], canvas: Canvas, first: str) -> list[Column | Flexible]:
    """Of the requests that are shown."""
    names = [canvas.text(request.id) for request in requests]
    longest = max((name.cell_len for name in names), default=0)
    return [
        Flexible(first, lambda width: [canvas.cut(name, width) for name in names], 14, max(14, longest)),
        Column("state", [_request_state(request, canvas) for request in requests]),
        Column("age", [Text(duration(request.age_seconds)) for request in requests], right=True),
        Column("prompt", [Text(str(request.prompt_tokens)) for request in requests], right=True, yields=1),
        Column("generated", [Text(str(request.generated_tokens)) for request in requests], right=True),
    ]


def _request_state(request: Request, canvas: Canvas) -> Text:
    return canvas.text(request.state, "green" if request.state == "running" else "yellow")


def task_lines(tasks: Sequence[Task], canvas: Canvas) -> list[Text]:
    """A line each: what, how long, and why it failed."""
    lines = []
    for task in tasks:
        style = {"running": "green", "refused": "yellow", "failed": "red"}.get(task.status, "dim")
        what = canvas.text(f"{task.kind} {task.detail or ''}")
        items = [what, canvas.text(f"{task.status} {_took(task)}", style)]
        if task.error:
            items.append(canvas.text(task.error, "red"))
        lines.append(canvas.cut(Text(" " * 2).join(items), canvas.width))
    return lines


def _took(task: Task) -> str:
    return f"for {duration(task.seconds)}" if task.status == "running" else f"after {duration(task.seconds)}"


def hit_share(hits: int, misses: int) -> Text:
    return Text(percent(hits / (hits + misses)) if hits + misses else "-")
