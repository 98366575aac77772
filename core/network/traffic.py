"""What has gone over links."""

from __future__ import annotations

from dataclasses import dataclass, fields

from core.network.frames import Header, Opcode

_PROBES = frozenset({Opcode.PROBE, Opcode.GROUP})
_SIGNS = frozenset({Opcode.HEARTBEAT, Opcode.REPORT})


@dataclass(slots=True)
class LinkStats:
    """Since a link began, or of several together; payload bytes alone. `stale` are frames of another epoch, which are
    dropped. What went by RDMA is among the bytes, too. Tensors are frames with a dtype; signs are heartbeats and
    reports; blocks are what carries KV, counted by whoever sends and asks for it. Queries are rows that the other end
    is to attend with."""

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
    sent_rdma_bytes: int = 0
    received_rdma_bytes: int = 0
    sent_gpudirect: int = 0
    sent_blocks: int = 0
    received_blocks: int = 0
    sent_queries: int = 0
    received_queries: int = 0

    def sent(self, opcode: Opcode, nbytes: int, *, tensor: bool, rdma: bool) -> None:
        """Count a frame; not what only measures."""
        if opcode in _PROBES:
            return
        self.sent_frames += 1
        self.sent_bytes += nbytes
        if rdma:
            self.sent_rdma_bytes += nbytes
        if tensor:
            self.sent_tensors += 1
            self.sent_tensor_bytes += nbytes
        elif opcode in _SIGNS:
            self.sent_signs += 1
        elif opcode is Opcode.QUERY:
            self.sent_queries += 1

    def received(self, header: Header, *, rdma: bool) -> None:
        """Count a frame."""
        if header.opcode in _PROBES:
            return
        self.received_frames += 1
        self.received_bytes += header.nbytes
        if rdma:
            self.received_rdma_bytes += header.nbytes
        if header.dtype != "bytes":
            self.received_tensors += 1
        elif header.opcode in _SIGNS:
            self.received_signs += 1
        elif header.opcode is Opcode.QUERY:
            self.received_queries += 1

    def add(self, other: LinkStats) -> None:
        """Count what another one has counted."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
