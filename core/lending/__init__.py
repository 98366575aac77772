"""Who lends memory to whom and when it comes back: policy over bytes, speeds and times. No torch, no threads."""

from core.lending.away import AwayGroup, Choice, SiteSpeeds, decide
from core.lending.budget import GPUBudget
from core.lending.demand import DemandWatch
from core.lending.lease import Lease, LeaseState, Urgency, bytes_to_move
from core.lending.pool import LendingStats, VRAMLendingPool

__all__ = [
    "AwayGroup",
    "Choice",
    "DemandWatch",
    "GPUBudget",
    "Lease",
    "LeaseState",
    "LendingStats",
    "SiteSpeeds",
    "Urgency",
    "VRAMLendingPool",
    "bytes_to_move",
    "decide",
]
