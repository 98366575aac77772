"""Names that metrics share."""

NAMESPACE = "vramancer"
COMING = ("fastpath_", "vtp_", "ha_", "telemetry_")
"""Metrics that begin so belong to features that are not in this version: they are absent, not 0."""
