"""What has gone over links."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class LinkStats:
    """Since a link began, or of several together; payload bytes alone. `stale` are frames of another epoch, which are
    dropped. Tensors are frames with a dtype; signs are heartbeats and reports; blocks are what carries KV, counted by
    whoever sends and asks for it."""

    sent_frames: int = 0
    sent_bytes: int = 0
    received_frames: int = 0
    received_bytes: int = 0
    stale: int = 0
    sent_tensors: int = 0
    sent_tensor_bytes: int = 0
    received_tensors: int = 0
    sent_signs: int = 0
    received_signs: int = 0
    sent_blocks: int = 0
    received_blocks: int = 0

    def add(self, other: LinkStats) -> None:
        """Count what another one has counted."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
