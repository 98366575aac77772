"""Blocks of KV below VRAM: host RAM, another node's RAM, disk, remote storage; addressed by content."""

from core.memory.hierarchy import HierarchicalMemory
from core.memory.hotness import HeatModel
from core.memory.loading import Loading, Slot
from core.memory.lower_tier import LowerTier
from core.memory.opening import open_memory
from core.memory.peer import InProcessPeer, Peer, PeerStore
from core.memory.policy import MemoryOptions, RestorePlan, WriteRules, worth_restoring
from core.memory.records import BlockInfo, BlockLayout, MemoryStats, Tier, TierSpeed, TierStats

__all__ = [
    "BlockInfo",
    "BlockLayout",
    "HeatModel",
    "HierarchicalMemory",
    "InProcessPeer",
    "Loading",
    "LowerTier",
    "MemoryOptions",
    "MemoryStats",
    "Peer",
    "PeerStore",
    "RestorePlan",
    "Slot",
    "Tier",
    "TierSpeed",
    "TierStats",
    "WriteRules",
    "open_memory",
    "worth_restoring",
]
