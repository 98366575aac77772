"""The picture that `vramancer status` draws of a server: from what its API says, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vramancer.cli.bars import Part, bar, flow, glyphs_for, legend, size
from vramancer.cli.terminal import plain_text

_BAR = (18, 60)
"""Least and most cells of a bar."""
_BESIDE_BAR = 22
"""Columns for what stands at its right."""
_TIER_BAR = (6, 24)
"""Cells of a tier's bar on narrow and on wide consoles."""
_WIDE = 100
TIERS = {"L3": "main memory", "L4": "other node", "L5": "disk", "L6": "remote"}
_MOST_REQUESTS = 8
_MOST_LEASES = 8

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Facts:
    """Answers of the server at `url`: `/api/pipeline/status`, `/api/queue/status`, `/api/batcher/stats` and
    `/api/system`."""

    url: str
    pipeline: Json
    queue: Json
    batcher: Json
    system: Json


def picture(facts: Facts, console: Console) -> RenderableType:
    """For this console's width, characters and colours."""
    drawing = _Drawing(console)
    parts: list[RenderableType] = [*drawing.head(facts), *drawing.troubles(facts.pipeline)]
    memory = facts.pipeline.get("memory") or {}
    if memory.get("devices"):
        parts += ["", *drawing.devices(memory, facts.pipeline["stages"])]
    if memory.get("tiers") or memory.get("tier_troubles"):
        parts += ["", *drawing.tiers(memory)]
    if memory.get("leases"):
        parts += ["", *drawing.leases(memory["leases"])]
    parts += ["", *drawing.requests(facts)]
    return Group(*parts)


class _Drawing:
    """The picture's parts, as this console can show them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._glyphs = glyphs_for(console)

    def _text(self, text: object, style: str = "") -> Text:
        return plain_text(str(text), self._console, style)

    def head(self, facts: Facts) -> Iterable[RenderableType]:
        """Model, state, for how long; where."""
        pipeline, model = facts.pipeline, facts.pipeline.get("model")
        state = self._text(pipeline["state"], "green" if pipeline["ready"] else "yellow")
        up = f"up {duration(facts.system['process']['uptime_s'])}"
        name = self._text(model["name"] if model else "no model", "bold")
        yield Text.assemble(name, "  ", state, f", {up}", "  ", self._text(facts.url, "dim"))
        if model:
            sizes = f"{count(model['parameters'])} parameters in {model['dtype']}, context {model['max_model_len']}"
            yield self._text(f"{sizes}, loaded in {model['load_seconds']:.1f} s", "dim")

    def troubles(self, pipeline: Json) -> Iterable[RenderableType]:
        """Checks that are not ok, and where the plan is not what was asked for."""
        colors = {"degraded": "yellow", "error": "red"}
        for name, check in pipeline.get("subsystems", {}).items():
            if check["status"] != "ok":
                yield self._text(f"{check['status']}: {name}: {check['detail']}", colors.get(check["status"], ""))
        for note in pipeline.get("notes", ()):
            yield self._text(f"note: {note}", "dim")

    def devices(self, memory: Json, stages: Sequence[Json]) -> Iterable[RenderableType]:
        """A bar for each device, and what it is made of."""
        yield Text("Memory in GiB", "bold")
        devices = memory["devices"]
        width = max(len(device["name"]) for device in devices)
        for device in devices:
            parts = device_parts(device, memory["kv_blocks"] or {})
            limit, free = device["limit_bytes"], device["free_bytes"]
            drawn = bar(parts, limit, self._bar_width(width), self._glyphs)
            yield Text.assemble(
                self._text(device["name"].ljust(width)), "  ", drawn, f"  {size(limit - free)} of {size(limit)}"
            )
            below = self._below(device, parts, stages, self._console.width - width - 2)
            yield Padding(below, (0, 0, 0, width + 2))
        blocks = memory["kv_blocks"]
        if blocks:
            tokens = blocks["size_tokens"]
            used, cached = (blocks["with_memory"] - blocks["free"]) * tokens, blocks["cached"] * tokens
            yield self._text(
                f"KV cache for {blocks['with_memory'] * tokens} tokens: {used} in use, {cached} kept for prompts that "
                "begin alike",
                "dim",
            )

    def _below(self, device: Json, parts: Sequence[Part], stages: Sequence[Json], width: int) -> Text:
        items = legend(parts, self._glyphs)
        if device["borrowed_bytes"]:
            items.append(Text(f"borrows {size(device['borrowed_bytes'])} elsewhere"))
        placed = [stage for stage in stages if stage["device"] == device["name"]]
        shown = ", ".join("{}-{}".format(*stage["layers"]) for stage in placed)
        streamed = sum(len(stage["streamed_layers"]) for stage in placed)
        items.append(Text(f"layers {shown}" if shown else "no layers"))
        if streamed:
            items.append(Text(f"{streamed} layers streamed from main memory"))
        return flow(items, width)

    def _bar_width(self, name_width: int) -> int:
        least, most = _BAR
        return max(least, min(most, self._console.width - name_width - 2 - _BESIDE_BAR))

    def tiers(self, memory: Json) -> Iterable[RenderableType]:
        """What is kept below the devices."""
        yield Text("Tiers below the devices", "bold")
        if memory["tiers"]:
            table = Table.grid(padding=(0, 2, 0, 0))
            for justify in ("left", "left", "right", "right", "right", "right"):
                table.add_column(justify=justify, no_wrap=True)
            cells = _TIER_BAR[self._console.width >= _WIDE]
            for tier in memory["tiers"]:
                used, capacity = tier["used_bytes"], tier["capacity_bytes"]
                part = Part("used", used, "kv_cached")
                table.add_row(
                    self._text(TIERS.get(tier["tier"], tier["tier"])),
                    bar([part, Part("free", max(0, capacity - used), "free")], capacity, cells, self._glyphs),
                    f"{size(used)} of {size(capacity)} GiB",
                    f"{tier['blocks']} blocks",
                    f"{hit_rate(tier['hits'], tier['misses'])} hits",
                    f"read {speed(tier['read_bytes_per_second'])}",
                )
            yield table
        for name, trouble in memory["tier_troubles"].items():
            yield self._text(f"{TIERS.get(name, name)} is not used: {trouble}", "yellow")

    def leases(self, leases: Sequence[Json]) -> Iterable[RenderableType]:
        """Who lends how much to whom."""
        yield Text("Leases", "bold")
        table = Table.grid(padding=(0, 2, 0, 0))
        for lease in leases[:_MOST_LEASES]:
            table.add_row(
                self._text(f"{lease['lender']} lends {lease['borrower']}"),
                f"{size(lease['bytes'])} GiB",
                f"{lease['blocks']} blocks",
                self._text(lease["state"]),
                f"for {duration(lease['age_seconds'])}",
            )
        yield table
        yield from self._more(len(leases) - _MOST_LEASES)

    def requests(self, facts: Facts) -> Iterable[RenderableType]:
        """What runs and waits, since when, and how fast."""
        queue, batcher = facts.queue, facts.batcher
        yield Text.assemble(
            ("Requests", "bold"), f"  {queue['running']} running, {queue['waiting']} waiting of {queue['limit']}"
        )
        now = (facts.pipeline.get("prediction") or {}).get("now") or {}
        rate = f"{batcher['tokens_per_second']:.1f} tok/s"
        predicted = f" (predicted {now['predicted']:.1f})" if now.get("predicted") else ""
        since = (
            f"{batcher['generated_tokens']} tokens since the start, {batcher['prefix_hit_rate']:.0%} of prompts cached"
        )
        yield self._text(f"{rate}{predicted}; {since}", "dim" if not queue["running"] else "")
        shown = queue.get("requests", ())
        if shown:
            table = Table.grid(padding=(0, 2, 0, 0))
            table.add_column(max_width=24, no_wrap=True, overflow="ellipsis" if self._glyphs.rich else "crop")
            table.add_column(no_wrap=True)
            for _ in range(3):
                table.add_column(justify="right", no_wrap=True)
            for request in shown[:_MOST_REQUESTS]:
                table.add_row(
                    self._text(request["id"]),
                    self._text(request["state"], "green" if request["state"] == "running" else "yellow"),
                    duration(request["age_seconds"]),
                    f"{request['prompt_tokens']} prompt",
                    f"{request['generated_tokens']} generated",
                )
            yield table
        yield from self._more(queue["unfinished"] - min(len(shown), _MOST_REQUESTS))

    @staticmethod
    def _more(number: int) -> Iterable[RenderableType]:
        if number > 0:
            yield Text(f"and {number} more", "dim")


def device_parts(device: Json, kv_blocks: Json) -> list[Part]:
    """What a device's memory is, in order. Its own KV pages are split as the blocks of the whole cache are."""
    own = device["own_kv_bytes"]
    backed = kv_blocks.get("with_memory") or 0
    used = own * (backed - kv_blocks["free"]) // backed if backed else 0
    cached = own * kv_blocks["cached"] // backed if backed else 0
    return [
        Part("weights", device["weights_bytes"], "weights"),
        Part("KV in use", used, "kv_used"),
        Part("KV cached", cached, "kv_cached"),
        Part("KV empty", own - used - cached, "kv_empty"),
        Part("workspace", device["other_bytes"], "workspace"),
        Part("lent", device["lent_bytes"], "lent"),
        Part("free", device["free_bytes"], "free"),
    ]


def duration(seconds: float) -> str:
    """For people: "4.2 s", "3 min 05 s", "2 h 05 min", "3 d 4 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def count(number: int) -> str:
    """For people: "870 K", "7.6 B"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)


def speed(bytes_per_second: float | None) -> str:
    return "unmeasured" if bytes_per_second is None else f"{bytes_per_second / 1e9:.1f} GB/s"


def hit_rate(hits: int, misses: int) -> str:
    return f"{hits / (hits + misses):.0%}" if hits + misses else "0%"
