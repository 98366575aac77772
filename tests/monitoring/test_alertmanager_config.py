"""Alertmanager takes its configuration, and sends alerts where it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from alert_harness import with_webhook
from monitoring_files import ALERTMANAGER, read_yaml, run


def test_alertmanager_takes_the_configuration() -> None:
    checked = run("amtool", "check-config", ALERTMANAGER)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alertmanager_takes_the_example_of_a_receiver(tmp_path: Path) -> None:
    example = tmp_path / "alertmanager.yml"
    example.write_text(with_webhook(ALERTMANAGER.read_text(encoding="utf-8"), "http://127.0.0.1:1/"), encoding="utf-8")
    assert run("amtool", "check-config", example).returncode == 0
    receivers = {each["name"]: each for each in read_yaml(example)["receivers"]}
    assert [each["webhook_configs"][0]["url"] for each in receivers.values()] == ["http://127.0.0.1:1/"] * 2


@pytest.mark.parametrize("severity", ["warning", "critical"])
def test_severity_chooses_the_receiver(severity: str) -> None:
    asked = ("config", "routes", "test", f"--config.file={ALERTMANAGER}")
    found = run("amtool", *asked, "alertname=GPUMemoryHigh", f"severity={severity}")
    assert (found.returncode, found.stdout.strip()) == (0, severity)


def test_one_message_for_each_alert_of_each_server() -> None:
    assert read_yaml(ALERTMANAGER)["route"]["group_by"] == ["alertname", "instance"]


def test_nothing_is_sent_anywhere_unless_somebody_says_where() -> None:
    assert [set(each) for each in read_yaml(ALERTMANAGER)["receivers"]] == [{"name"}, {"name"}]
