"""Alerts that fire, as Prometheus has them. The server asks, so browsers need to reach nothing else."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from core.errors import UnavailableError

TIMEOUT_S = 2.0
MAX_BYTES = 1 << 20
MAX_ALERTS = 100


def firing(url: str) -> list[dict[str, Any]]:
    """Name, severity, summary, labels and start of each, worst first. Raises `UnavailableError` without an answer."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/v1/alerts", timeout=TIMEOUT_S) as answer:
            found = json.loads(answer.read(MAX_BYTES))["data"]["alerts"]
        alerts = [_alert(alert) for alert in found if alert["state"] == "firing"]
    except (OSError, ValueError, LookupError, TypeError) as error:  # urllib's errors are OSErrors
        raise UnavailableError(f"Prometheus does not tell its alerts: {error}") from error
    return sorted(alerts, key=lambda alert: (alert["severity"] != "critical", alert["name"]))[:MAX_ALERTS]


def _alert(alert: dict[str, Any]) -> dict[str, Any]:
    labels, notes = dict(alert["labels"]), alert.get("annotations", {})
    return {
        "name": labels.pop("alertname", "alert"),
        "severity": labels.pop("severity", ""),
        "summary": notes.get("summary") or notes.get("description") or "",
        "labels": labels,
        "since": alert.get("activeAt"),
    }
