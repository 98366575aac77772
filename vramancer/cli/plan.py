"""`vramancer plan`: where a model's layers would go, and how fast that would be."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.config import Settings
from vramancer.cli.options import settings_command

if TYPE_CHECKING:
    from core.engine.preview import Preview


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
    from rich.console import Console

    from core.engine.preview import preview
    from core.logs import configure_logging
    from vramancer.cli.plan_view import print_plan

    configure_logging(settings.logging)
    shown = preview(settings, gpu or (), more=more or ())
    if as_json:
        typer.echo(json.dumps(as_dict(shown), indent=2))
    else:
        print_plan(shown, Console())


def as_dict(shown: Preview) -> dict[str, Any]:
    """The placement's own fields, then `model`, `pooled`, `prediction`, `one_more`, `assumed`, `reserved_bytes` of each
    device and `notes`."""
    from vramancer.cli.plan_view import assumptions

    result = dataclasses.asdict(shown.placement) | {"pooled": dataclasses.asdict(shown.pooled)}
    prediction = shown.prediction
    result["prediction"] = None
    if prediction is not None:
        result["prediction"] = dataclasses.asdict(prediction)
        for target, rate in zip(result["prediction"]["rates"], prediction.rates, strict=True):
            target["roofline_share"] = rate.roofline_share
    result["one_more"] = [dataclasses.asdict(effect) | {"gain": effect.gain} for effect in shown.one_more]
    result["assumed"] = assumptions(shown)
    result["model"] = dataclasses.asdict(shown.model)
    result["reserved_bytes"] = list(shown.reserved_bytes)
    result["notes"] = list(shown.notes)
    return result
