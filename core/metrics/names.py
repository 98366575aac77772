"""Names that metrics share."""

NAMESPACE = "vramancer"
COMING = ("vtp_gpudirect_ops_total", "ha_")
"""Metrics that begin so belong to features that are not in this version: they are absent, not 0."""
