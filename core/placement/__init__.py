"""Which layers go on which device, and how fast that is. Pure functions over bytes, speeds and budgets; no torch."""

from core.placement.splitter import split_by_memory

__all__ = ["split_by_memory"]
