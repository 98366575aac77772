"""`vramancer doctor`: how fast the devices are, what limits them, and what is not as it should be."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core.config import Settings
from core.devices import format_bytes
from vramancer.cli.options import settings_command

if TYPE_CHECKING:
    from core.profiling.diagnosis import DeviceDiagnosis, Diagnosis


@settings_command("model", "devices", "engine", "logging", "runtime", model_argument=True)
def doctor(
    settings: Settings,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what has been measured before.")] = False,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", min=0.01, max=600.0, help="Seconds of measuring per device. Not set: about two."),
    ] = None,
) -> None:
    """Measure the devices and the links between them, and say what limits them and what is wrong."""
    from core.logs import configure_logging
    from core.profiling.diagnosis import diagnose

    configure_logging(settings.logging)
    found = diagnose(settings, refresh) if seconds is None else diagnose(settings, refresh, budget_s=seconds)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        print_diagnosis(found, Console())


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """Devices, links, limits, warnings."""
    console.print(_devices_table(found))
    if found.links:
        console.print(_links_table(found))
    for device in found.devices:
        console.print(escape(device.limits))
    for warning in found.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    if not found.warnings:
        console.print("Nothing is wrong.")


def _devices_table(found: Diagnosis) -> Table:
    """One row per figure and one column per device: names of products are long."""
    title = f"Devices, for layers of {found.model} in {found.dtype} (torch {found.torch})"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for device in found.devices:
        table.add_column(escape(device.name))
    rows = [_device_rows(device) for device in found.devices]
    for label in rows[0]:
        if any(cells[label] for cells in rows):
            table.add_row(label, *(escape(cells[label]) for cells in rows))
    return table


def _device_rows(device: DeviceDiagnosis) -> dict[str, str]:
    from core.profiling.diagnosis import format_rate

    sheet, shared, largest = device.datasheet, device.sharing, list(device.flops)[-1]
    cells = {
        "device": f"{device.product} ({device.kind})",
        "memory": format_bytes(device.total_bytes),
        "free now": format_bytes(device.free_bytes),
        "limit": format_bytes(device.limit_bytes),
        "figures": device.source,
        "attention": device.attention,
        "bandwidth": _share(format_rate(device.bandwidth_bytes_s, "B"), sheet.bandwidth_share if sheet else None),
        "attention to KV": format_rate(device.kv_bandwidth_bytes_s, "B"),
    }
    for rows, rate in device.flops.items():
        share = sheet.flops_share if sheet is not None and rows == largest else None
        label = f"rate, {rows} row" if rows == "1" else f"rate, {rows} rows"
        cells[label] = _share(format_rate(rate, "FLOP"), share)
    beside = f"reading {shared.reading:.2f}, computing {shared.computing:.2f} times as long" if shared else ""
    return cells | {
        "overhead per layer": f"{device.layer_overhead_s * 1e6:.0f} us",
        "overhead per layer and token": f"{device.row_overhead_s * 1e6:.1f} us",
        "overhead per step": f"{device.step_overhead_s * 1e6:.0f} us",
        "beside other parts": beside,
    }


def _share(figure: str, share: float | None) -> str:
    return figure if share is None else f"{figure} ({share:.0%} of the datasheet's)"


def _links_table(found: Diagnosis) -> Table:
    from core.profiling.diagnosis import format_rate

    names = {"p2p": "peer to peer", "staged": "staged through the host", "copy": "copy"}
    table = Table(title="Links", title_justify="left")
    for column in ("from", "to", "method"):
        table.add_column(column)
    for column in ("latency", "bandwidth"):
        table.add_column(column, justify="right")
    for link in found.links:
        figures = (f"{link.latency_s * 1e6:.0f} us", format_rate(link.bandwidth_bytes_s, "B"))
        table.add_row(escape(link.src), escape(link.dst), names.get(link.method, link.method), *figures)
    return table
