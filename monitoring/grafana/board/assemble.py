"""Puts sections together to a board: ids, places, links, variables, annotations."""

from __future__ import annotations

import json
from typing import Any

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from monitoring.grafana.board.panels import SOURCE, WIDTH, Panel, Section
from monitoring.grafana.board.queries import SERVER
from monitoring.grafana.board.sections import SECTIONS

UID = "vramancer"
SECTION_IDS = 100
"""Ids are reserved for so many panels of a section, so that one that is added leaves those of others as they are."""
ALERT_MARKS = {
    "step": "15s",
    "titleFormat": "{{alertname}}",
    "textFormat": "{{severity}}: {{instance}} {{gpu}}{{path}}{{method}}",
    "tagKeys": "severity,instance",
    "useValueForTime": False,
}
"""What Grafana's Prometheus annotations have beyond the fields that the SDK knows."""


def board_json() -> str:
    """The whole board as Grafana reads it."""
    board: dict[str, Any] = json.loads(json.dumps(_board().build(), cls=JSONEncoder))
    for annotation in board["annotations"]["list"]:
        annotation.update(ALERT_MARKS)
    return json.dumps(board, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _board() -> build.Dashboard:
    board = build.Dashboard("VRAMancer").uid(UID).tags(["vramancer", "llm"]).editable().timezone("browser")
    board.description("One model across devices that do not match: requests, tokens, cards, memory, transfers.")
    board.time("now-1h", "now").refresh("30s").tooltip(model.DashboardCursorSync.CROSSHAIR)
    for variable in _variables():
        board.with_variable(variable)
    board.annotation(
        build.AnnotationQuery()
        .name("Alerts")
        .datasource(SOURCE)
        .enable(True)
        .icon_color("red")
        .expr(f'ALERTS{{alertstate="firing", job="vramancer", {SERVER}}}')
    )
    ids, y = _ids(), 0
    for index, section in enumerate(SECTIONS):
        row = build.Row(section.title).id(SECTION_IDS * (index + 1)).collapsed(section.collapsed)
        row.grid_pos(model.GridPos(x=0, y=y, w=WIDTH, h=1))
        y += 1
        finished, below = _placed([_finished(panel, ids) for panel in section.panels], y)
        if section.collapsed:
            for panel in finished:
                row.with_panel(panel)
        board.with_row(row)
        if not section.collapsed:
            y = below
            for panel in finished:
                board.with_panel(panel)
    result: build.Dashboard = board
    return result


def _placed(panels: list[Any], y: int) -> tuple[list[Any], int]:
    """The panels of a section from left to right, in lines from `y` on; and where the next section begins."""
    x = height = 0
    for panel in panels:
        size = panel.build().grid_pos
        if x + size.w > WIDTH:
            x, y, height = 0, y + height, 0
        panel.grid_pos(model.GridPos(x=x, y=y, w=size.w, h=size.h))
        x, height = x + size.w, max(height, size.h)
    return panels, y + height


def _ids() -> dict[str, int]:
    """Of panels, by title."""
    return {
        panel.title: SECTION_IDS * (index + 1) + place
        for index, section in enumerate(SECTIONS)
        for place, panel in enumerate(section.panels, start=1)
    }


def _finished(panel: Panel, ids: dict[str, int]) -> Any:
    built = panel.built.id(ids[panel.title])
    if panel.leads_to is not None:
        url = f"/d/{UID}?viewPanel={ids[panel.leads_to]}&${{__url_time_range}}&${{__all_variables}}"
        built.links([build.DashboardLink(panel.leads_to).type(model.DashboardLinkType.LINK).url(url)])
    return built


def _variables() -> list[Any]:
    everything = model.VariableOption(selected=True, text="All", value="$__all")
    source = build.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    found: list[Any] = [source]
    for name, label, query in (
        ("instance", "Server", "label_values(vramancer_process_start_time_seconds, instance)"),
        ("gpu", "Device", f"label_values(vramancer_gpu_memory_total_bytes{{{SERVER}}}, gpu)"),
    ):
        variable = build.QueryVariable(name).label(label).query(query).datasource(SOURCE).current(everything)
        variable.multi(True).include_all(True).all_value(".+")
        variable.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(model.VariableSort.ALPHABETICAL_ASC)
        found.append(variable)
    return found


def panels_of(sections: tuple[Section, ...] = SECTIONS) -> list[Panel]:
    """Every panel of the board, in order."""
    return [panel for section in sections for panel in section.panels]
