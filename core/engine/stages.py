"""What an engine drives: stages in this process, and stages on workers."""

from __future__ import annotations

from typing import TypeAlias

from core.cluster.placed_stage import PlacedRemoteStage
from core.execution.stage import Stage

EngineStage: TypeAlias = Stage | PlacedRemoteStage
