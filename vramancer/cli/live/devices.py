"""The second page: devices in full, the stages of the pipeline, nodes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from vramancer.cli.bars import bar, flow, legend, size
from vramancer.cli.live.answers import DeviceMemory, Nodes, Reading, Stage
from vramancer.cli.live.canvas import TITLE, Block, Canvas, Column, Flexible
from vramancer.cli.live.figures import UNKNOWN, percent, rate, share_bar
from vramancer.cli.live.parts import parts_of, used_of
from vramancer.cli.live.watch import Seen

_BAR = (14, 60)


def devices_page(seen: Seen, canvas: Canvas) -> list[Block]:
    memory = seen.look.pipeline.memory
    blocks = [Block(_device(seen, canvas, device)) for device in memory.devices]
    if not blocks:
        blocks = [Block([Text("No device is in use: no model is loaded.", "dim")])]
    return [*blocks, Block(_stages(seen, canvas)), Block(_nodes(seen.look.nodes, canvas))]


def _device(seen: Seen, canvas: Canvas, device: DeviceMemory) -> list[Text]:
    """Its bar, what that is made of, and what the driver says."""
    parts = parts_of(seen, device)
    name = canvas.cut(canvas.text(device.name, TITLE), 20)
    used = used_of(device.limit_bytes - device.free_bytes, device.limit_bytes)
    room = canvas.width - name.cell_len - used.cell_len - 4 - len(" GiB")
    drawn = bar(parts, device.limit_bytes, max(_BAR[0], min(_BAR[1], room)), canvas.glyphs)
    first = Text.assemble(name, "  ", drawn, "  ", used, " GiB")
    items = legend(parts, canvas.glyphs)
    if device.borrowed_bytes:
        items.append(Text(f"borrows {size(device.borrowed_bytes)} elsewhere"))
    reading = seen.look.readings.get(device.name)
    lines = [first, *_flowed(items, canvas)]
    if reading is not None:
        lines += _flowed(_read(reading, canvas), canvas)
    return [canvas.cut(line, canvas.width) for line in lines]


def _flowed(items: Sequence[Text], canvas: Canvas) -> list[Text]:
    if not items:
        return []
    lines = flow(items, canvas.width - 2).split("\n")
    return [Text.assemble("  ", line) for line in lines]


def _read(reading: Reading, canvas: Canvas) -> list[Text]:
    """What is known of it."""
    items = []
    if reading.utilization is not None:
        items.append(Text(f"utilisation {percent(reading.utilization)}"))
    if reading.temperature_c is not None:
        items.append(Text(f"{reading.temperature_c:.0f}{canvas.degree}"))
    if reading.power_w is not None:
        limit = "" if reading.power_limit_w is None else f" of {reading.power_limit_w:.0f}"
        items.append(Text(f"{reading.power_w:.0f}{limit} W"))
    if reading.pcie_generation is not None and reading.pcie_width is not None:
        items.append(Text(f"PCIe {reading.pcie_generation} x{reading.pcie_width}"))
    if reading.other_bytes:
        items.append(Text(f"other programs {size(reading.other_bytes)}"))
    if reading.throttling:
        items.append(canvas.text(f"slowed down: {', '.join(reading.throttling)}", "yellow"))
    return items


def _stages(seen: Seen, canvas: Canvas) -> list[Text]:
    """How busy each was in the last seconds, beside what was predicted of its steps."""
    stages, lately = seen.look.pipeline.stages, seen.lately
    if not stages:
        return []
    busy, predicted = lately.busy or {}, lately.predicted or {}
    columns: list[Column | Flexible] = [
        Column("Stages", [canvas.cut(canvas.text(f"{each.index} {each.device}"), 18) for each in stages]),
        Column("layers", [Text("{}-{}".format(*each.layers)) for each in stages], right=True),
        Flexible(
            "busy lately",
            lambda width: [share_bar(busy.get(each.index, 0.0), width, canvas.glyphs) for each in stages],
            11,
            40,
        ),
        Column("", [Text(percent(busy.get(each.index))) for each in stages], right=True),
        Column("predicted", [Text(percent(predicted.get(each.index))) for each in stages], right=True, yields=1),
        Column("weights", [Text(size(each.weight_bytes)) for each in stages], right=True, yields=2),
        Column("a step", [_step(each) for each in stages], right=True, yields=3),
        Column("attention", [canvas.text(each.attention) for each in stages], yields=5),
    ]
    if any(each.streamed_layers for each in stages):
        streamed = [Text(str(len(each.streamed_layers) or "")) for each in stages]
        columns.insert(5, Column("streamed", streamed, right=True, yields=1))
    return [*canvas.columns(columns), *_rates(seen)]


def _step(stage: Stage) -> Text:
    return Text(UNKNOWN if stage.seconds_per_forward is None else f"{1000 * stage.seconds_per_forward:.1f} ms")


def _rates(seen: Seen) -> list[Text]:
    """Measured beside predicted."""
    prediction, measured = seen.look.pipeline.prediction, seen.lately.tokens_per_second
    if measured is None or prediction is None or not prediction.now.predicted:
        return []
    return [Text(f"{rate(measured)} tok/s lately, {rate(prediction.now.predicted)} predicted for what runs now", "dim")]


def _nodes(nodes: Nodes | None, canvas: Canvas) -> list[Text]:
    if nodes is None or not nodes.nodes:
        return []
    lines = canvas.columns(
        [
            Column("Nodes", [canvas.text(node.hostname) for node in nodes.nodes]),
            Column("roles", [canvas.text(", ".join(node.roles)) for node in nodes.nodes]),
            Column(
                "devices",
                [canvas.text(", ".join(device.name for device in node.devices) or "none") for node in nodes.nodes],
            ),
        ]
    )
    if nodes.discovery.status:
        lines.append(canvas.text(f"discovery of others: {nodes.discovery.status}", "dim"))
    return lines
