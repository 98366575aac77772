"""A plan for people: the verdict first, then a bar per device, speeds, and what the numbers rest on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.costs.cards import DATASHEET_LAYER_OVERHEAD_S
from core.costs.cost import loaded_layers
from core.costs.room import CONTEXT_BYTES, DESKTOP_BYTES
from core.devices import format_bytes
from core.devices.device import GPU_KINDS

if TYPE_CHECKING:
    from core.costs import StagePlan
    from core.engine.preview import Preview
    from core.placement.predict import DeviceEffect, Prediction

WIDE = 100
"""Columns from which on a device's figures stand beside its bar."""
_WIDE_BAR, _BAR = 36, 60
_MIB, _GIB = 1024**2, 1024**3

_PARTS = (("weights", "#", "█", "cyan"), ("KV", "=", "▓", "green"), ("workspace", "+", "▒", "yellow"),
          ("free", ".", "░", "dim"), ("kept", "x", "╳", "dim red"))  # fmt: skip
_LIMITS = {
    "bandwidth": "reading weights and KV",
    "compute": "computing",
    "overhead": "overhead of layers",
    "link": "links",
}


def print_plan(shown: Preview, console: Console) -> None:
    """The whole picture. No line needs more than the console's width."""
    for line in _verdict(shown):
        console.print(line)
    console.print()
    for bar in _bars(shown, console):
        console.print(bar)
    if shown.prediction is not None:
        console.print()
        _print_rates(shown.prediction, console)
    for text in _remarks(shown):
        console.print(text, highlight=False)
    console.print()
    for text in basis(shown):
        console.print(text, style="dim", highlight=False)


def gib(nbytes: float) -> str:
    """ "12.3 GiB", "64 MiB"; what is small in its own unit."""
    if nbytes >= 0.1 * _GIB:
        return f"{nbytes / _GIB:.1f} GiB"
    return f"{nbytes / _MIB:.0f} MiB" if nbytes >= 10 * _MIB else format_bytes(int(nbytes))


def _verdict(shown: Preview) -> Iterator[Text]:
    placement, model = shown.placement, shown.model
    streamed = sum(len(stage.streamed_layers) for stage in placement.stages)
    verdict = "Fits, with layers in main memory." if streamed else "Fits."
    weights = sum(stage.weight_bytes for stage in placement.stages) + placement.streamed_bytes
    size = (
        f"{model.num_parameters / 1e9:.3g} B" if model.num_parameters >= 1e8 else f"{model.num_parameters / 1e6:.3g} M"
    )
    line = Text(verdict, style="bold yellow" if streamed else "bold green")
    yield line.append(
        f" {placement.model_name}: {size} parameters, {gib(weights)} in {model.quantization or model.dtype}",
        style="not bold default",
    )
    per_token = sum(stage.kv_bytes_per_token for stage in placement.stages)
    own = f", {placement.kv_tokens:,} without lending" if shown.pooled.tokens > placement.kv_tokens else ""
    longest = f"longest context {model.max_model_len:,}"
    yield Text(f"{shown.pooled.tokens:,} tokens of KV{own} ({longest}, {format_bytes(per_token)} a token)")
    prediction = shown.prediction
    if prediction is None:
        yield Text("Speed not predicted: with one device nothing depends on it, so it was not measured.")
        return
    rates = [rate for rate in prediction.rates if rate.streams in (1, 8)] or prediction.rates[:1]
    speeds = Text(", ").join(
        Text(f"{rate.tok_s:.1f} tok/s", style="bold").append(f" at {_streams(rate.streams)}", style="not bold")
        for rate in rates
    )
    yield speeds.append(f" (predicted, {prediction.context:,} tokens of context each)", style="dim")


def _streams(number: int) -> str:
    return f"{number} stream" if number == 1 else f"{number} streams"


def _bars(shown: Preview, console: Console) -> Iterator[Text]:
    """A device's memory as a bar with what is in it; on narrow screens the figures stand below."""
    stages = shown.placement.stages
    width = max(len(stage.device_name) for stage in stages)
    is_wide, plain = console.width >= WIDE, console.options.ascii_only
    for stage in stages:
        kept = shown.reserved_bytes[stage.device_index] if shown.reserved_bytes else 0
        parts = (stage.weight_bytes, stage.kv_bytes, stage.workspace_bytes, stage.free_bytes, kept)
        total = stage.limit_bytes + kept
        line = Text(stage.device_name.ljust(width), style="bold").append("  ")
        line.append_text(_bar(parts, total, _WIDE_BAR if is_wide else min(_BAR, console.width - width - 4), plain))
        figures = _figures(stage, parts, total)
        if is_wide:
            yield line.append("  ").append_text(figures)
        else:
            yield line
            yield Text(" " * (width + 2)).append_text(figures)
    marks = Text("  ").join(
        Text(ascii_mark if plain else mark, style=style).append(f" {name}", style="dim")
        for name, ascii_mark, mark, style in _PARTS[: 5 if any(shown.reserved_bytes) else 4]
    )
    yield Text(" " * (width + 2)).append_text(marks)
    if shown.placement.unused_devices:
        own = shown.pooled.tokens > shown.placement.kv_tokens
        what = "no layers, memory for KV alone" if own else "not used"
        yield Text(f"{what}: {', '.join(shown.placement.unused_devices)}")


def _bar(parts: tuple[int, ...], total: int, width: int, plain: bool) -> Text:
    bar, done, at = Text(), 0, 0
    for nbytes, (_, ascii_mark, mark, style) in zip(parts, _PARTS, strict=True):
        done += nbytes
        until = round(width * done / max(1, total))
        bar.append((ascii_mark if plain else mark) * (until - at), style=style)
        at = until
    return bar


def _figures(stage: StagePlan, parts: tuple[int, ...], total: int) -> Text:
    weights, kv, workspace, _, _ = parts
    layers = f"layers {stage.first_layer}-{stage.last_layer - 1} ({stage.num_layers})"
    text = Text(layers).append(f"  {gib(weights)} + {gib(kv)} KV + {gib(workspace)} of {gib(total)}", style="dim")
    if stage.streamed_layers:
        text.append(f"  {len(stage.streamed_layers)} streamed", style="yellow")
    return text


def _print_rates(prediction: Prediction, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("streams", "tok/s", "ms/token", "of roofline"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bottleneck", overflow="fold")
    for rate in prediction.rates:
        slowest = rate.bottleneck
        table.add_row(
            str(rate.streams), f"{rate.tok_s:.1f}", f"{rate.token_s * 1e3:.1f}", f"{rate.roofline_share:.0%}",
            f"{slowest.name}: {slowest.limited_by}, busy {slowest.busy:.0%}",
        )  # fmt: skip
    console.print(table)
    one = prediction.rates[0]
    way_s = sum(one.spent_s.values())
    spent = sorted(one.spent_s.items(), key=lambda item: -item[1])
    shares = [f"{_LIMITS[limit]} {seconds / way_s:.0%}" for limit, seconds in spent if seconds > 0.005 * way_s]
    console.print(
        f"A token takes {way_s * 1e3:.1f} ms at {_streams(one.streams)}: {', '.join(shares)}. No step can take less "
        f"than {prediction.floor_s * 1e3:.1f} ms: every byte is read once per token.",
        highlight=False,
    )


def _remarks(shown: Preview) -> Iterator[str]:
    for stage in shown.placement.stages:
        if stage.streamed_layers:
            per_step = sum(shown.problem.costs.layer_bytes[layer] for layer in loaded_layers(stage.streamed_layers))
            share = f"{len(stage.streamed_layers)} of {stage.num_layers} layers"
            yield f"{stage.device_name} streams {share} from main memory, {gib(per_step)} per step"
    for note in shown.notes:
        yield f"note: {note}"
    if shown.prediction is not None:
        for effect in shown.prediction.unused:
            yield f"{effect.name} is left out: {_effect(effect, 'using it')}"
    for effect in shown.one_more:
        yield f"one more {effect.name}: {_gain(effect)}"


def _gain(effect: DeviceEffect) -> str:
    """What one more device brings; it may stay unused, so it costs nothing."""
    if effect.tok_s is None or effect.gain is None:
        return _effect(effect, "with it")
    rate, without = f"{effect.tok_s:.1f}", f"{effect.tok_s_without:.1f}"
    if rate == without:
        return f"brings nothing ({rate} tok/s with and without it)"
    if f"{effect.gain:.0%}" == "0%":
        return f"brings hardly anything ({rate} instead of {without} tok/s)"
    return _effect(effect, "with it")


def _effect(effect: DeviceEffect, what: str) -> str:
    if effect.tok_s is None or effect.gain is None:
        return f"no plan {what} holds as much KV"
    return f"{what} gives {effect.tok_s:.1f} instead of {effect.tok_s_without:.1f} tok/s ({effect.gain:+.0%})"


def basis(shown: Preview) -> list[str]:
    """What the numbers rest on: what was measured, what a datasheet says, what is assumed."""
    devices = {stage.device_name for stage in shown.placement.stages}
    profiles = [device.profile for device in shown.problem.devices if device.name in devices]
    sources = {profile.source for profile in profiles}
    lines = []
    if shown.prediction is not None and "measured" in sources:
        lines.append("measured: the speeds of these devices and of the links between them")
    if shown.prediction is not None and "emulated" in sources:
        lines.append("as told: the speeds of emulated devices")
    if "datasheet" in sources or shown.one_more:
        lines.append("from datasheets: memory, bandwidth and compute of the cards")
    return lines + assumptions(shown)


def assumptions(shown: Preview) -> list[str]:
    """What a prediction rests on that nobody has measured."""
    if shown.prediction is None:
        return []
    lines = []
    by_datasheet = any(device.profile.source == "datasheet" for device in shown.problem.devices)
    if by_datasheet or shown.one_more:
        told = [f"{DATASHEET_LAYER_OVERHEAD_S * 1e3:g} ms of overhead per layer and step"]
        if by_datasheet:
            link = shown.problem.links.default
            told.append(f"links of {link.bandwidth_bytes_s / 1e9:g} GB/s and {link.latency_s * 1e6:g} us")
        lines.append(f"assumed: {', '.join(told)}")
    if any(shown.reserved_bytes):
        lines.append(
            f"kept on each card: what its driver takes, {gib(CONTEXT_BYTES)} for a process's context, and "
            f"{gib(DESKTOP_BYTES)} for a desktop on cards that drive screens"
        )
    on_gpus = [by_datasheet or stage.device_name.startswith(tuple(GPU_KINDS)) for stage in shown.placement.stages]
    if shown.model.quantization and any(on_gpus):
        lines.append(
            "assumed: that products read quantized weights as they are; on GPUs torch makes numbers of them first, "
            "which is slower than plain weights"
        )
    if sum(on_gpus) > 1:
        lines.append(
            "predicted, not measured: that cards whose work one process launches overlap; the interpreter's lock may "
            "take some of it"
        )
    return lines
