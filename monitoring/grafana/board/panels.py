"""How panels look. Each function makes one kind; what is shown is said in `sections`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.models import common as look
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_look
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from monitoring.grafana.board.queries import Query

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
"""The Prometheus that is chosen at the top of the board."""
WIDTH = 24
"""Columns of the board's grid."""
COMING = "These metrics come with a later version; until then there is no data."
QUANTILE_COLORS = {"^p50": "green", "^p95": "yellow", "^p99": "red"}
GOOD, NOTABLE, BAD = "green", "orange", "red"

Steps = Sequence[tuple[float | None, str]]
"""Colors from values on; the first has no value."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel that stands somewhere; a click on its link shows the panel whose title is `leads_to`, alone."""

    title: str
    built: Any
    leads_to: str | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """A row of the board. One that is collapsed asks Prometheus nothing until it is opened."""

    title: str
    panels: tuple[Panel, ...]
    collapsed: bool = False


def lines(
    title: str,
    about: str,
    *queries: Query,
    unit: str,
    width: int = 8,
    height: int = 8,
    stacked: bool = False,
    limits: Steps = (),
    top: float | None = None,
    colors: Mapping[str, str] | None = None,
    dashed: str | None = None,
    coming: bool = False,
    leads_to: str | None = None,
) -> Panel:
    """Values over time, never below 0. `limits` are drawn as dashed lines, `colors` are by patterns of legends, and
    series whose legend matches `dashed` are drawn as thin dashes."""
    panel = _common(timeseries.Panel(), title, about, queries, unit, width, height, coming=coming)
    panel.min(0).line_width(2).fill_opacity(35 if stacked else 10).show_points(look.VisibilityMode.NEVER)
    panel.gradient_mode(look.GraphGradientMode.OPACITY)
    panel.color_scheme(build.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
    panel.legend(
        common.VizLegendOptions()
        .display_mode(look.LegendDisplayMode.TABLE)
        .placement(look.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "max"])
    )
    panel.tooltip(common.VizTooltipOptions().mode(look.TooltipDisplayMode.MULTI).sort(look.SortOrder.DESCENDING))
    if stacked:
        panel.stacking(common.StackingConfig().mode(look.StackingMode.NORMAL).group("A"))
    if limits:
        panel.thresholds(_thresholds(((None, "transparent"), *limits)))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(look.GraphThresholdsStyleMode.DASHED))
    if top is not None:
        panel.max(top)
    for pattern, color in (colors or {}).items():
        panel.override_by_regexp(f"/{pattern}/", [_value("color", {"mode": "shades", "fixedColor": color})])
    if dashed is not None:
        style = {"fill": "dash", "dash": [8, 8]}
        plain = [_value("custom.lineStyle", style), _value("custom.lineWidth", 1), _value("custom.fillOpacity", 0)]
        panel.override_by_regexp(f"/{dashed}/", [*plain, _value("custom.stacking", {"mode": "none", "group": "B"})])
    return Panel(title, panel, leads_to)


def number(
    title: str, about: str, *queries: Query, unit: str, steps: Steps, steps_of: Mapping[str, Steps] | None = None,
    width: int = 3, leads_to: str | None = None,
) -> Panel:  # fmt: skip
    """What is now, large, in the color of its step, over a line of how it came to that. `steps_of` are for single
    series, by their legend."""
    panel = _common(stat.Panel(), title, about, queries, unit, width, 4)
    panel.thresholds(_thresholds(steps)).graph_mode(look.BigValueGraphMode.AREA)
    panel.color_mode(look.BigValueColorMode.VALUE).reduce_options(_last())
    text = look.BigValueTextMode.VALUE_AND_NAME if len(queries) > 1 else look.BigValueTextMode.VALUE
    panel.text_mode(text).justify_mode(look.BigValueJustifyMode.CENTER)
    for name, own in (steps_of or {}).items():
        panel.override_by_name(name, [_value("thresholds", {"mode": "absolute", "steps": _steps(own)})])
    return Panel(title, panel, leads_to)


def meters(
    title: str, about: str, query: Query, *, unit: str, steps: Steps, width: int = 8, height: int = 8,
    top: float | None = None, leads_to: str | None = None,
) -> Panel:  # fmt: skip
    """A bar for each series, as long as it is full."""
    panel = _common(bargauge.Panel(), title, about, (query,), unit, width, height)
    panel.min(0).thresholds(_thresholds(steps)).reduce_options(_last())
    panel.orientation(look.VizOrientation.HORIZONTAL).display_mode(look.BarGaugeDisplayMode.GRADIENT)
    panel.value_mode(look.BarGaugeValueMode.COLOR).name_placement(look.BarGaugeNamePlacement.LEFT)
    if top is not None:
        panel.max(top)
    return Panel(title, panel, leads_to)


def spread(title: str, about: str, query: Query, *, unit: str, width: int = 8, height: int = 8) -> Panel:
    """How many observations fell where, over time. The query gives buckets."""
    panel = _common(heatmap.Panel(), title, about, (query,), unit, width, height, form=PromQueryFormat.HEATMAP)
    panel.calculate(False).cell_gap(1).y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(look.AxisPlacement.LEFT))
    panel.color(
        heatmap.HeatmapColorOptions()
        .mode(heatmap_look.HeatmapColorMode.SCHEME)
        .scheme("Oranges")
        .scale(heatmap_look.HeatmapColorScale.EXPONENTIAL)
        .exponent(0.5)
        .steps(64)
    )
    panel.filter_values(heatmap.FilterValueRange().le(1e-9)).mode(look.TooltipDisplayMode.SINGLE).show_y_histogram()
    panel.exemplars_color("rgba(255,0,255,0.7)").hide_legend()
    return Panel(title, panel)


def periods(title: str, about: str, query: Query, *, steps: Steps, width: int = 8, height: int = 8) -> Panel:
    """When something was so: a bar for each series, in the color of its step."""
    panel = _common(statetimeline.Panel(), title, about, (query,), "none", width, height)
    panel.thresholds(_thresholds(steps)).show_value(look.VisibilityMode.NEVER).merge_values(True)
    panel.color_scheme(build.FieldColor().mode(model.FieldColorModeId.THRESHOLDS)).row_height(0.8).no_value("none")
    panel.legend(common.VizLegendOptions().show_legend(False).display_mode(look.LegendDisplayMode.HIDDEN))
    return Panel(title, panel)


def _common(
    panel: Any, title: str, about: str, queries: Sequence[Query], unit: str, width: int, height: int, *,
    coming: bool = False, form: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> Any:  # fmt: skip
    panel.title(title).description(f"{about} {COMING}" if coming else about).datasource(SOURCE)
    panel.unit(unit).span(width).height(height)
    if coming:
        panel.no_value("comes with a later version")
    for letter, query in zip("ABCDEFGHIJ", queries, strict=False):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(letter).range()
        panel.with_target(target.format(form).exemplar(query.exemplars).datasource(SOURCE))
    return panel


def _thresholds(steps: Steps) -> build.ThresholdsConfig:
    config: build.ThresholdsConfig = build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(_steps(steps))
    return config


def _steps(steps: Steps) -> list[model.Threshold]:
    return [model.Threshold(value, color) for value, color in steps]


def _last() -> common.ReduceDataOptions:
    options: common.ReduceDataOptions = common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
    return options


def _value(name: str, value: object) -> model.DynamicConfigValue:
    return model.DynamicConfigValue(name, value)
