"""`vramancer plan`: where a model's layers would go."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from core.config import Settings
from core.devices import format_bytes
from vramancer.cli.options import settings_command

if TYPE_CHECKING:
    from core.placement import PlacementPlan


@settings_command("model", "devices", "engine", "logging", "runtime", model_argument=True)
def plan(
    settings: Settings,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the placement of a model over the devices, without loading its weights."""
    from core.inference_pipeline import plan_placement
    from core.logs import configure_logging

    configure_logging(settings.logging)
    placement = plan_placement(settings)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(placement), indent=2))
    else:
        print_plan(placement, Console())


def print_plan(placement: PlacementPlan, console: Console) -> None:
    """One row per stage, in the order of execution."""
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
    console.print(f"KV cache: {placement.kv_tokens} tokens, {format_bytes(per_token)} each over all stages")
    if placement.unused_devices:
        console.print(f"not used: {', '.join(placement.unused_devices)}")
