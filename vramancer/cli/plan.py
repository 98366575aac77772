"""`vramancer plan`: where a model's layers would go, and how fast that would be."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.config import Settings
from vramancer.cli.options import settings_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.engine.best_fit import Verdict
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
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Try the weights as they are, int8 and int4, and plan the best of them that fits."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print the placement of a model over devices and its predicted speed, without loading its weights."""
    from rich.console import Console

    from core.engine.best_fit import best_fit
    from core.engine.preview import preview
    from core.logs import configure_logging
    from vramancer.cli.fit_view import print_fit
    from vramancer.cli.plan_view import print_plan

    configure_logging(settings.logging)
    console, gpus, others = Console(), gpu or (), more or ()
    verdicts = best_fit(settings, gpus, more=others) if fit else ()
    shown = (verdicts[0].shown if verdicts else None) or preview(settings, gpus, more=others)
    if as_json:
        typer.echo(json.dumps(as_dict(shown, verdicts), indent=2))
        return
    if verdicts:
        print_fit(verdicts, console)
    print_plan(shown, console)


def as_dict(shown: Preview, verdicts: Sequence[Verdict] = ()) -> dict[str, Any]:
    """The placement's own fields, then `model`, `pooled`, `prediction`, `one_more`, `assumed`, `reserved_bytes` of each
    device and `notes`; `fit` if there are verdicts, the chosen one first."""
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
    if verdicts:
        result["fit"] = [
            {
                "quantize": verdict.quantize, "title": verdict.title, "fits": verdict.fits,
                "streamed_layers": verdict.streamed_layers,
                "kv_tokens": verdict.shown.pooled.tokens if verdict.shown is not None else 0,
                "tok_s": verdict.tok_s, "reason": verdict.reason,
            }
            for verdict in verdicts
        ]  # fmt: skip
    return result
