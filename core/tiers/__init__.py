"""Blocks of KV below VRAM: host RAM, another node's RAM, disk, remote storage; addressed by content."""

from core.tiers.hierarchy import HierarchicalMemory
from core.tiers.opening import open_lasting, open_memory
from core.tiers.policy import worth_restoring
from core.tiers.records import BlockLayout, Tier

__all__ = ["BlockLayout", "HierarchicalMemory", "Tier", "open_lasting", "open_memory", "worth_restoring"]
