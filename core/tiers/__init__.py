"""Blocks of KV below VRAM: host RAM, another node's RAM, disk, remote storage; addressed by content."""

from core.tiers.hierarchy import HierarchicalMemory
from core.tiers.hotness import HeatModel
from core.tiers.loading import HostSlot, Loading
from core.tiers.lower_tier import LowerTier
from core.tiers.opening import open_lasting, open_memory
from core.tiers.peer import InProcessPeer, PeerStore
from core.tiers.policy import MemoryOptions, WriteRules, worth_restoring
from core.tiers.records import BlockLayout, Tier, TierSpeed

__all__ = [
    "BlockLayout",
    "HeatModel",
    "HierarchicalMemory",
    "HostSlot",
    "InProcessPeer",
    "Loading",
    "LowerTier",
    "MemoryOptions",
    "PeerStore",
    "Tier",
    "TierSpeed",
    "WriteRules",
    "open_lasting",
    "open_memory",
    "worth_restoring",
]
