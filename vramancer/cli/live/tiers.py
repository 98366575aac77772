"""The fourth page: tiers below the devices, what moves between them, who lends to whom."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from vramancer.cli.bars import size
from vramancer.cli.live.answers import Lease, Memory, Move, Tier
from vramancer.cli.live.canvas import TITLE, Block, Canvas, Column, Flexible
from vramancer.cli.live.figures import percent, share_bar
from vramancer.cli.live.parts import hit_share, used_of
from vramancer.cli.live.watch import Seen
from vramancer.cli.picture import TIERS, duration, speed

_NAMES = {"L1": "devices", "L2": "other devices", **TIERS}


def tier_name(tier: str) -> str:
    return _NAMES.get(tier, tier)


def blocks_in(tier: Tier) -> int:
    """That have come since the start."""
    return sum(move.blocks for move in tier.moves if move.target == tier.tier)


def blocks_out(tier: Tier) -> int:
    """That have left since the start."""
    return sum(move.blocks for move in tier.moves if move.source == tier.tier)


def tiers_page(seen: Seen, canvas: Canvas) -> list[Block]:
    memory = seen.look.pipeline.memory
    return [
        Block(_kv(memory, canvas)),
        Block(_tiers(memory, canvas)),
        Block(_moves(memory.tiers, canvas)),
        Block(_leases(memory.leases, canvas)),
    ]


def _kv(memory: Memory, canvas: Canvas) -> list[Text]:
    blocks = memory.kv_blocks
    if not blocks or not blocks.with_memory:
        return [Text("No KV cache: no model is loaded.", "dim")]
    used = blocks.with_memory - blocks.free
    items = [
        Text.assemble(("KV on the devices", TITLE), f"  {percent(used / blocks.with_memory)} in use"),
        share_bar(used / blocks.with_memory, 24, canvas.glyphs),
    ]
    tokens = blocks.size_tokens
    said = (
        f"{used * tokens} tokens of {blocks.with_memory * tokens}; {blocks.cached * tokens} kept for prompts that begin"
    )
    return [canvas.beside(items), canvas.cut(Text(f"{said} alike", "dim"), canvas.width)]


def _tiers(memory: Memory, canvas: Canvas) -> list[Text]:
    tiers = memory.tiers
    notes = [
        canvas.text(f"{tier_name(name)} is not used: {why}", "yellow") for name, why in memory.tier_troubles.items()
    ]
    if not tiers:
        return [Text.assemble(("Tiers", TITLE), "  none below the devices"), *notes]
    shares = [tier.used_bytes / tier.capacity_bytes if tier.capacity_bytes else 0.0 for tier in tiers]
    lines = canvas.columns(
        [
            Column("Tiers", [canvas.text(tier_name(tier.tier)) for tier in tiers]),
            Flexible(
                "GiB", lambda width: [share_bar(each, width, canvas.glyphs, "kv_cached") for each in shares], 6, 30
            ),
            Column("in use", [used_of(tier.used_bytes, tier.capacity_bytes) for tier in tiers]),
            Column("blocks", [Text(str(tier.blocks)) for tier in tiers], right=True, yields=2),
            Column("hits", [hit_share(tier.hits, tier.misses) for tier in tiers], right=True),
            Column("reads", [Text(speed(tier.read_bytes_per_second)) for tier in tiers], right=True, yields=1),
            Column("writes", [Text(speed(tier.write_bytes_per_second)) for tier in tiers], right=True, yields=3),
        ]
    )
    return [*lines, *(canvas.cut(note, canvas.width) for note in notes)]


def _moves(tiers: Sequence[Tier], canvas: Canvas) -> list[Text]:
    """Each once: both tiers of a move name it."""
    found: dict[tuple[str, str, str | None], Move] = {}
    for tier in tiers:
        found |= {(move.kind, move.source, move.target): move for move in tier.moves if move.blocks}
    if not found:
        return []
    moves = sorted(found.values(), key=lambda move: -move.blocks)
    return canvas.columns(
        [
            Column("Moves since the start", [canvas.text(move.kind) for move in moves]),
            Column("from", [canvas.text(tier_name(move.source)) for move in moves]),
            Column("to", [canvas.text(tier_name(move.target) if move.target else "nowhere") for move in moves]),
            Column("blocks", [Text(str(move.blocks)) for move in moves], right=True),
        ]
    )


def _leases(leases: Sequence[Lease], canvas: Canvas) -> list[Text]:
    if not leases:
        return [Text.assemble(("Leases", TITLE), "  no device lends to another")]
    return canvas.columns(
        [
            Column("Leases", [canvas.text(f"{lease.lender} lends {lease.borrower}") for lease in leases]),
            Column("GiB", [Text(size(lease.bytes)) for lease in leases], right=True),
            Column("blocks", [Text(str(lease.blocks)) for lease in leases], right=True, yields=1),
            Column("state", [canvas.text(lease.state) for lease in leases]),
            Column("for", [Text(duration(lease.age_seconds)) for lease in leases], right=True),
        ]
    )
