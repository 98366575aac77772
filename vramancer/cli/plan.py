"""`vramancer plan`: where a model's layers would go, and how fast that would be."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from core.config import Settings
from core.costs.cards import DATASHEET_LAYER_OVERHEAD_S
from core.costs.cost import loaded_layers
from core.devices import format_bytes
from core.devices.device import GPU_KINDS
from vramancer.cli.options import settings_command

if TYPE_CHECKING:
    from core.costs import LayerCosts, PlacementPlan
    from core.engine.model_plan import Preview
    from core.placement.predict import DeviceEffect, Prediction


@settings_command("model", "devices", "engine", "lending", "logging", "runtime", model_argument=True)
def plan(
    settings: Settings,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            metavar="CARD",
            help='Plan for this card instead of this machine; may be repeated: "3090", "3090*2", "24GiB@936GB/s".',
        ),
    ] = None,
    more: Annotated[
        list[str] | None, typer.Option("--more", metavar="CARD", help="Also say what one more card would bring.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print the placement of a model over devices and its predicted speed, without loading its weights."""
    from core.engine.model_plan import preview
    from core.logs import configure_logging

    configure_logging(settings.logging)
    shown = preview(settings, gpu or (), more=more or ())
    if as_json:
        typer.echo(json.dumps(as_dict(shown), indent=2))
    else:
        print_plan(shown, Console())


def as_dict(shown: Preview) -> dict[str, Any]:
    """The placement's own fields, then `pooled`, `prediction`, `one_more`, `assumed` and `notes`."""
    result = dataclasses.asdict(shown.placement) | {"pooled": dataclasses.asdict(shown.pooled)}
    prediction = shown.prediction
    result["prediction"] = None
    if prediction is not None:
        result["prediction"] = dataclasses.asdict(prediction)
        for target, rate in zip(result["prediction"]["rates"], prediction.rates, strict=True):
            target["roofline_share"] = rate.roofline_share
    result["one_more"] = [dataclasses.asdict(effect) | {"gain": effect.gain} for effect in shown.one_more]
    result["assumed"] = assumptions(shown)
    result["notes"] = list(shown.notes)
    return result


def print_plan(shown: Preview, console: Console) -> None:
    """Stages in the order of execution, then what to expect of them."""
    _print_stages(shown.placement, shown.pooled.tokens, console)
    _print_streams(shown.placement, shown.problem.costs, console)
    for note in shown.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if shown.prediction is None:
        console.print("One device: nothing depends on its speed, so it was not measured.")
        return
    _print_prediction(shown.prediction, console)
    for effect in shown.prediction.unused:
        console.print(f"{effect.name} is left out: {_effect(effect, 'using it')}")
    for effect in shown.one_more:
        console.print(f"one more {effect.name}: {_gain(effect)}")
    for line in assumptions(shown):
        console.print(line, soft_wrap=True)


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
        lines.append(f"assumed of cards that are not here: the speeds of their datasheets, {', '.join(told)}")
    on_gpus = [by_datasheet or stage.device_name.startswith(tuple(GPU_KINDS)) for stage in shown.placement.stages]
    if sum(on_gpus) > 1:
        lines.append(
            "predicted, not measured: that cards whose work one process launches overlap; the interpreter's lock may "
            "take some of it"
        )
    return lines


def _print_stages(placement: PlacementPlan, pooled_tokens: int, console: Console) -> None:
    table = Table(title=f"{placement.model_name}, strategy {placement.strategy}", title_justify="left")
    table.add_column("stage", justify="right")
    for column in ("device", "layers"):
        table.add_column(column)
    for column in ("weights", "KV cache", "workspace", "unused", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    for index, stage in enumerate(placement.stages):
        sizes = (stage.weight_bytes, stage.kv_bytes, stage.workspace_bytes, stage.free_bytes, stage.limit_bytes)
        layers = f"{stage.first_layer}-{stage.last_layer - 1} ({stage.num_layers})"
        table.add_row(str(index), stage.device_name, layers, *map(format_bytes, sizes))
    console.print(table)
    per_token = sum(stage.kv_bytes_per_token for stage in placement.stages)
    own = f", {placement.kv_tokens} without lending" if pooled_tokens > placement.kv_tokens else ""
    console.print(f"KV cache: {pooled_tokens} tokens{own}, {format_bytes(per_token)} each over all stages")
    if placement.unused_devices:
        what = "no layers, memory for KV alone" if own else "not used"
        console.print(f"{what}: {', '.join(placement.unused_devices)}")


def _print_streams(placement: PlacementPlan, costs: LayerCosts, console: Console) -> None:
    for stage in placement.stages:
        if stage.streamed_layers:
            per_step = sum(costs.layer_bytes[layer] for layer in loaded_layers(stage.streamed_layers))
            share = f"{len(stage.streamed_layers)} of {stage.num_layers} layers"
            line = f"{stage.device_name} streams {share} from main memory, {format_bytes(per_step)} per step"
            console.print(line, soft_wrap=True)


def _print_prediction(prediction: Prediction, console: Console) -> None:
    table = Table(title=f"predicted decode, {prediction.context} tokens of context", title_justify="left")
    for column in ("streams", "steps in flight", "tok/s", "ms per token", "of the roofline"):
        table.add_column(column, justify="right")
    table.add_column("bottleneck")
    for rate in prediction.rates:
        slowest = rate.bottleneck
        table.add_row(
            str(rate.streams),
            str(rate.cohorts),
            f"{rate.tok_s:.1f}",
            f"{rate.token_s * 1e3:.1f}",
            f"{rate.roofline_share:.0%}",
            f"{slowest.name} ({slowest.limited_by}, busy {slowest.busy:.0%})",
        )
    console.print(table)
    console.print(f"no step can be faster than {prediction.floor_s * 1e3:.1f} ms: every byte is read once per token")


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
