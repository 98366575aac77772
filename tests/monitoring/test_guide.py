"""`docs/monitoring.md` has every metric and every alert, and nothing else."""

from __future__ import annotations

import re

from known_metrics import COMING, FAMILIES, VLLM
from monitoring_files import GUIDE, alerts, board, panels, recorded

TEXT = GUIDE.read_text(encoding="utf-8")


def part(heading: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    level = heading.split(" ", maxsplit=1)[0]
    return re.split(rf"^#{{1,{len(level)}}} ", TEXT.split(f"\n{heading}\n")[1], flags=re.MULTILINE)[0]


def first_cells(text: str) -> list[str]:
    """Names in the first column of tables, without their labels."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name.split("{")[0] for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_every_metric_stands_in_one_table() -> None:
    tables = part("## Metrics")
    named = first_cells(tables.split("### vLLM's names")[0])
    assert sorted(named) == sorted({*FAMILIES, *COMING})
    assert sorted(first_cells(part("### With later versions"))) == sorted(COMING)


def test_vllms_names_and_recorded_series_are_all_there() -> None:
    assert sorted(first_cells(part("### vLLM's names"))) == sorted(VLLM)
    assert sorted(first_cells(part("### Recorded series"))) == sorted(recorded())


def test_every_alert_has_a_heading_in_the_order_of_the_rules() -> None:
    headings = re.findall(r"^### (\w+)$", part("## Alerts"), flags=re.MULTILINE)
    assert headings == list(alerts())


def test_an_alert_is_described_with_its_severity_and_its_limits() -> None:
    for name, rule in alerts().items():
        first = part(f"### {name}").strip().splitlines()[0]
        assert first.startswith(f"*{rule['labels']['severity'].capitalize()}: "), name
        waits = re.fullmatch(r"(\d+)m", rule["for"])
        if waits is not None and name != "InferenceStopped":
            assert waits[1] in first or (waits[1] == "1" and "a minute" in first), name


def test_panels_that_the_page_names_are_on_the_board() -> None:
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*.:]+)\*(?!\*)", TEXT.replace("\n", " ")))
    menus = {"Dashboards", "New", "Import"}
    assert len(named - menus) > 10
    assert named - menus <= {panel["title"] for panel in panels(board())}
