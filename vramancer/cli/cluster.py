"""`vramancer cluster`: join a master with this machine, and see which machines serve together."""

from __future__ import annotations

import json
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from core.config import MemorySettings, Settings
from core.devices import format_bytes
from core.logs import configure_logging
from vramancer import __version__
from vramancer.cli.client import ApiClient
from vramancer.cli.options import settings_command
from vramancer.cli.parsing import Commands, SettingsCommand
from vramancer.cli.terminal import plain_text

if TYPE_CHECKING:
    from core.cluster.worker import Worker

INTERRUPTED = 130

cluster = typer.Typer(
    cls=Commands,
    suggest_commands=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Several machines that serve one model.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@settings_command(
    "cluster", "devices", "memory", "logging", "runtime",
    without=("cluster.accept", "cluster.auto_place", "cluster.wait_s", "devices.num_gpus", "devices.placement",
             "devices.layers", "devices.objective",
             *(f"memory.{name}" for name in MemorySettings.model_fields if name != "host_bytes")),
)  # fmt: skip
def join(settings: Settings) -> int:
    """Compute for a master, which is looked for on the network unless --master says where it is. Ctrl-C leaves once
    the layers are elsewhere; a second one leaves at once."""
    from core.cluster.opening import open_worker

    configure_logging(settings.logging)
    worker = open_worker(settings, version=__version__)
    return work(worker)


def work(worker: Worker) -> int:
    """Until it is stopped, by Ctrl-C or SIGTERM. Raises what `Worker.run` raises."""
    failed: list[Exception] = []
    ended = threading.Event()  # a join that is interrupted may take the thread for ended (CPython issue 89437)

    def run() -> None:
        try:
            worker.run()
        except Exception as error:  # noqa: BLE001  raised below
            failed.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="vrm-worker")
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        thread.start()
        status = _wait(worker, ended)
    finally:
        worker.stop()
        thread.join()
        worker.close()
        signal.signal(signal.SIGTERM, previous)
    if failed:
        raise failed[0]
    return status


def _wait(worker: Worker, ended: threading.Event) -> int:
    try:
        ended.wait()
    except KeyboardInterrupt:
        if not worker.has_joined:
            return INTERRUPTED
        typer.echo("leaving: the layers here move to other devices first; once more to leave at once", err=True)
    else:
        return 0
    try:
        worker.leave()
        ended.wait()
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@settings_command("api")
def status(
    settings: Settings,
    url: Annotated[
        str | None, typer.Option("--url", help="The server to ask. Not set: the one at --host and --port.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which machines serve together, what each holds, and the links between them."""
    found = ApiClient.for_settings(settings, url).get("/api/nodes")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console(highlight=False)
    console.print(nodes_table(found, console))
    for line in remarks(found):
        console.print(plain_text(line, console), soft_wrap=True)


def nodes_table(found: dict[str, Any], console: Console) -> Table:
    """What `/api/nodes` says, a line for each device."""
    table = Table(box=None, pad_edge=False)
    offers = any(node["lends_bytes"] for node in found["nodes"])
    for name in ("node", "address", "link", *(("for blocks (L4)",) if offers else ()), "device", "memory", "layers"):
        table.add_column(name, overflow="fold")
    for node in found["nodes"]:
        leaving = " (leaving)" if node["status"] == "leaving" else ""
        first = [f"{node['hostname']}{leaving}", node["address"] or "", link_text(node["link"])]
        if offers:
            first.append(_offer(node))
        for device in node["devices"] or [None]:
            row = (*first, *(_device(device, node["layers"]) if device else ("none in use", "", "")))
            table.add_row(*(plain_text(cell, console) for cell in row))
            first = [""] * len(first)
    return table


def link_text(link: dict[str, Any] | None) -> str:
    """How far away a node is, and how wide the way."""
    if link is None:
        return "this machine"
    over = "" if link["kind"] == "unknown" else f", {link['kind']}"
    sealed = ", encrypted" if link["encrypted"] else ""
    return f"{link['latency_s'] * 1e6:.0f} us, {link['bytes_per_second'] * 8 / 1e9:.2f} Gbit/s{over}{sealed}"


def _offer(node: dict[str, Any]) -> str:
    """Main memory that it offers to blocks of KV."""
    if not node["lends_bytes"]:
        return "none"
    return f"{format_bytes(node['lent_bytes'])} of {format_bytes(node['lends_bytes'])}"


def _device(device: dict[str, Any], layers: dict[str, list[int]]) -> tuple[str, str, str]:
    held = layers.get(device["name"])
    memory = f"{format_bytes(device['used_bytes'])} of {format_bytes(device['limit_bytes'])}"
    return device["name"], memory, f"{held[0]}-{held[1]}" if held else "none"


def remarks(found: dict[str, Any]) -> list[str]:
    """What else there is to say: where workers are taken in, what more there would be to gain, who was refused."""
    discovery, offer = found["discovery"], found["offer"]
    lines = []
    if discovery["status"] == "disabled":
        lines.append("This server accepts no workers; start it with --cluster-master.")
    else:
        how = "" if discovery["status"] == "advertised" else ", which they have to be told"
        lines.append(f"Workers are accepted at {discovery['address']}:{discovery['port']}{how}.")
    if offer is not None:
        streams = max(offer["tokens_per_second"], key=int)
        body = json.dumps({"devices": offer["devices"]} if offer["devices"] else {})
        lines.append(
            f"All nodes together would make {offer['tokens_per_second'][streams]:.4g} tokens/s of {streams} streams, "
            f"not {offer['now'][streams]:.4g}: POST {body} to /api/pipeline/place moves the model."
        )
    lines += [f"left out: {each['name']} ({each['address']}): {each['reason']}" for each in found["left_out"]]
    return lines


for command in (join, status):
    cluster.command(cls=SettingsCommand)(command)
