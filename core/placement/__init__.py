"""Which layers go on which device, and how fast that is. Pure functions over bytes, speeds and budgets; no torch."""

from core.placement.cost import (
    Batch,
    StageCost,
    StageTimer,
    at_once,
    best_cohorts,
    busy_s,
    decode_tok_s,
    load_s,
    pipeline_s,
    stage_s,
)
from core.placement.plan import Experts, LayerCosts, PlacementPlan, StagePlan
from core.placement.profile import DeviceProfile, LinkProfile, LinkTopology, Sharing, emulated_profile
from core.placement.splitter import split_by_memory

__all__ = [
    "Batch",
    "DeviceProfile",
    "Experts",
    "LayerCosts",
    "LinkProfile",
    "LinkTopology",
    "PlacementPlan",
    "Sharing",
    "StageCost",
    "StagePlan",
    "StageTimer",
    "at_once",
    "best_cohorts",
    "busy_s",
    "decode_tok_s",
    "emulated_profile",
    "load_s",
    "pipeline_s",
    "split_by_memory",
    "stage_s",
]
