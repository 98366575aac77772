"""Blocks of KV below VRAM: host RAM, another node's RAM, disk, remote storage; addressed by content."""

from core.tiers.hierarchy import HierarchicalMemory
from core.tiers.hotness import HeatModel
from core.tiers.loading import HostSlot, Loading
from core.tiers.lower_tier import LowerTier
from core.tiers.opening import open_lasting, open_memory
from core.tiers.peer import InProcessPeer, Peer, PeerStore
from core.tiers.policy import MemoryOptions, RestorePlan, WriteRules, worth_restoring
from core.tiers.records import BlockInfo, BlockLayout, MemoryStats, Tier, TierSpeed, TierStats

__all__ = [
    "BlockInfo",
    "BlockLayout",
    "HeatModel",
    "HierarchicalMemory",
    "HostSlot",
    "InProcessPeer",
    "Loading",
    "LowerTier",
    "MemoryOptions",
    "MemoryStats",
    "Peer",
    "PeerStore",
    "RestorePlan",
    "Tier",
    "TierSpeed",
    "TierStats",
    "WriteRules",
    "open_lasting",
    "open_memory",
    "worth_restoring",
]
