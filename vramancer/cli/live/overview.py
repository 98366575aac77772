"""The first page: everything that matters, on 80 x 24."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text

from vramancer.cli.bars import flow, size
from vramancer.cli.live.answers import Reading, Tier
from vramancer.cli.live.canvas import GAP, TITLE, Block, Canvas, Column, Flexible, stacked
from vramancer.cli.live.figures import percent, quantiles, rate, share_bar, sparkline
from vramancer.cli.live.parts import bars, hit_share, key_to_bars, request_columns, task_lines, troubles, used_of
from vramancer.cli.live.tiers import blocks_in, blocks_out, tier_name
from vramancer.cli.live.trend import Lately, rates
from vramancer.cli.live.watch import Seen

_SPARK = (12, 60)
"""Columns of the sparkline."""
_CELL_S = (10.0, 5.0)
"""Seconds that each stands for: where there are few, and from `_MANY` on."""
_MANY = 45
_LATENCIES = {"first_token": "first token", "between_tokens": "between tokens", "request": "whole request"}


def overview(seen: Seen, canvas: Canvas, rows: int) -> list[Text]:
    """In so many rows; what yields to the rest is on the other pages."""
    look = seen.look
    devices, requests = devices_table(seen, canvas), _requests(seen, canvas)
    blocks = [
        Block(troubles(seen, canvas), yields=3, least=1, more=_more("more: a larger window shows them")),
        Block(_speed(seen, canvas)),
        Block(_latency(seen, canvas), yields=1, close=True),
        Block(devices, yields=2, least=min(len(devices), 4), more=_more("more devices: 2")),
        Block(_legend(seen, canvas) if devices else [], yields=7, close=True),
        Block(_tiers(look.pipeline.memory.tiers, canvas), yields=4, least=2, more=_more("more tiers: 4")),
        Block(_tasks(seen, canvas), yields=5, least=2, more=_more("more tasks: 3")),
        Block(_nodes(seen, canvas), yields=6, least=0),
        Block(requests, yields=8, least=min(len(requests), 3), more=_more("more requests: 3", _unnamed(seen))),
    ]
    return stacked(blocks, rows)


def _more(what: str, unlisted: int = 0) -> Callable[[int], Text]:
    """How many lines are cut; one of them stood for those that are `unlisted`."""
    beyond = max(0, unlisted - 1)
    return lambda missing: Text(f"and {missing + beyond} {what}", "dim")


def _speed(seen: Seen, canvas: Canvas) -> list[Text]:
    """Tokens a second, now and in the last minutes; how many requests share them."""
    look, lately = seen.look, seen.lately
    now = lately.tokens_per_second
    if now is None:
        now = look.batcher.tokens_per_second if look.queue.running else 0.0
    said = f"{rate(now)} tok/s"
    prediction = look.pipeline.prediction
    if prediction:
        predicted = f" (predicted {rate(prediction.now.predicted)})" if prediction.now.predicted else ""
        said = (said + predicted).ljust(len("99.9 tok/s (predicted 999.9)"))  # the line beside it stays in its place
    speed = Text.assemble(("Speed   ", TITLE), said)
    items = [speed, *_sparkline(lately, canvas, canvas.width - speed.cell_len - GAP)]
    queue, batcher = look.queue, look.batcher
    most = f" of {batcher.max_batch_size}" if batcher.max_batch_size else ""
    shares = [
        Text.assemble(("Batch   ", TITLE), f"{queue.running} running{most}, {queue.waiting} waiting of {queue.limit}"),
        Text(f"last step {batcher.batch_size}"),
    ]
    blocks = look.pipeline.memory.kv_blocks
    if blocks and blocks.with_memory:
        shares.append(Text(f"KV {percent((blocks.with_memory - blocks.free) / blocks.with_memory)} in use"))
    shares.append(Text(f"prompts {percent(batcher.prefix_hit_rate)} cached"))
    return [canvas.beside(items), canvas.beside(shares)]


def _sparkline(lately: Lately, canvas: Canvas, room: int) -> list[Text]:
    """The last minutes and their peak, if that fits."""
    beside = room - GAP - len("peak 9999.9 in 9 min")
    cells = min(_SPARK[1], beside if beside >= _SPARK[0] else room)
    if cells < _SPARK[0]:
        return []
    cell_s = _CELL_S[cells >= _MANY]
    values = rates(lately.points, cells, cell_s)
    top = max((value for value in values if value), default=0.0)
    return [sparkline(values, canvas.glyphs), Text(f"peak {rate(top)} in {cells * cell_s / 60:.0f} min", "dim")]


def _latency(seen: Seen, canvas: Canvas) -> list[Text]:
    """Two lines, where the server measures it."""
    found = seen.look.batcher.latency
    if not found:
        return []
    columns: list[Column | Flexible] = [Column("Latency", [Text("p50 p95 p99", "dim")])]
    columns += [Column(name, [Text(quantiles(found.get(key)))]) for key, name in _LATENCIES.items()]
    return canvas.columns(columns)


def devices_table(seen: Seen, canvas: Canvas) -> list[Text]:
    """A line for each device: memory, layers, how busy, what its driver says."""
    memory, stages = seen.look.pipeline.memory, seen.look.pipeline.stages
    devices = memory.devices
    if not devices:
        return []
    names = [device.name for device in devices]
    placed = {name: [stage for stage in stages if stage.device == name] for name in names}
    busy = seen.lately.busy or {}
    columns: list[Column | Flexible] = [
        Column("Devices", [canvas.cut(canvas.text(name), 14) for name in names]),
        bars(seen, canvas, "memory, GiB", least=14, most=60),
        Column("in use", [used_of(device.limit_bytes - device.free_bytes, device.limit_bytes) for device in devices]),
    ]
    if any(device.borrowed_bytes for device in devices):
        cells = [Text(f"+{size(device.borrowed_bytes)}" if device.borrowed_bytes else "") for device in devices]
        columns.append(Column("borrows", cells, right=True, yields=4))
    layers = [",".join("{}-{}".format(*stage.layers) for stage in placed[name]) or "none" for name in names]
    columns.append(Column("layers", [Text(each) for each in layers], right=True, yields=5))
    shares = [[busy[stage.index] for stage in placed[name] if stage.index in busy] for name in names]
    columns.append(
        Column("busy", [Text(percent(min(1.0, sum(each)) if each else None)) for each in shares], right=True, yields=3)
    )
    columns += _readings([seen.look.readings.get(name, Reading()) for name in names], canvas)
    return canvas.columns(columns)


def _readings(readings: Sequence[Reading], canvas: Canvas) -> list[Column]:
    """Those columns of which anything is known."""
    found = (
        ("util", [percent(each.utilization) for each in readings], [each.utilization for each in readings], 3),
        ("temp", [_number(each.temperature_c, canvas.degree) for each in readings],
         [each.temperature_c for each in readings], 2),
        ("power", [_number(each.power_w, " W") for each in readings], [each.power_w for each in readings], 1),
    )  # fmt: skip
    return [
        Column(title, [Text(cell) for cell in cells], right=True, yields=10 - stays)
        for title, cells, known, stays in found
        if any(value is not None for value in known)
    ]


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.0f}{unit}"


def _legend(seen: Seen, canvas: Canvas) -> list[Text]:
    return list(flow(key_to_bars(seen, canvas), canvas.width).split("\n"))


def _tiers(tiers: Sequence[Tier], canvas: Canvas) -> list[Text]:
    """How full, how useful, what moves."""
    if not tiers:
        return []
    shares = [tier.used_bytes / tier.capacity_bytes if tier.capacity_bytes else 0.0 for tier in tiers]
    return canvas.columns(
        [
            Column("Tiers", [canvas.text(tier_name(tier.tier), "yellow" if tier.stopped else "") for tier in tiers]),
            Flexible(
                "GiB", lambda width: [share_bar(share, width, canvas.glyphs, "kv_cached") for share in shares], 8, 24
            ),
            Column("in use", [used_of(tier.used_bytes, tier.capacity_bytes) for tier in tiers]),
            Column("hits", [hit_share(tier.hits, tier.misses) for tier in tiers], right=True),
            Column("blocks in", [Text(str(blocks_in(tier))) for tier in tiers], right=True, yields=2),
            Column("out", [Text(str(blocks_out(tier))) for tier in tiers], right=True, yields=2),
        ]
    )


def _tasks(seen: Seen, canvas: Canvas) -> list[Text]:
    """What goes on in the background, and what failed of it."""
    tasks = seen.look.tasks
    if tasks is None:
        return []
    shown = [*tasks.running, *(task for task in tasks.recent if task.status in ("refused", "failed"))]
    lines = task_lines(shown, canvas)
    return [Text("Tasks", TITLE), *lines] if lines else []


def _nodes(seen: Seen, canvas: Canvas) -> list[Text]:
    """Where there are several."""
    nodes = seen.look.nodes
    if nodes is None or len(nodes.nodes) < 2:
        return []
    items = [Text("Nodes", TITLE)]
    items += [canvas.text(f"{node.hostname} ({', '.join(node.roles)})") for node in nodes.nodes]
    return [canvas.beside(items)]


def _requests(seen: Seen, canvas: Canvas) -> list[Text]:
    queue = seen.look.queue
    if not queue.requests:
        return [Text.assemble(("Requests", TITLE), "  none")] if not queue.unfinished else []
    lines = canvas.columns(request_columns(queue.requests, canvas, "Requests"))
    unnamed = _unnamed(seen)
    return [*lines, Text(f"and {unnamed} more, which came later", "dim")] if unnamed else lines


def _unnamed(seen: Seen) -> int:
    """Requests of which the server tells only that they are there: those beyond the oldest ones."""
    queue = seen.look.queue
    return max(0, queue.unfinished - len(queue.requests))
