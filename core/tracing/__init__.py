"""OpenTelemetry traces: what requests and background work did, and when.

Without `tracing.enabled` nothing of OpenTelemetry is imported. Its SDK reads its own `OTEL_*` variables, as everywhere:
where to send, with which headers, how large queues are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.config import TracingSettings
from core.errors import ConfigError

if TYPE_CHECKING:
    from core.tracing.tracing import Tracing

__all__ = ["open_tracing"]

PACKAGES = ("opentelemetry", "google", "requests")


def open_tracing(settings: TracingSettings) -> Tracing | None:
    """What records traces, None where none are wanted. Close it.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if not settings.enabled:
        return None
    try:
        from core.tracing.tracing import Tracing
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PACKAGES:
            raise
        raise ConfigError(
            f"tracing.enabled (VRM_TRACING) needs OpenTelemetry, and {error.name} is not installed: "
            "pip install 'vramancer[tracing]'."
        ) from error
    return Tracing(settings)
