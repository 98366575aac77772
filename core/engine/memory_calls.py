"""Moving memory by call: blocks between tiers, and what devices lend."""

from __future__ import annotations

from core.engine.model_engine import ModelEngine
from core.errors import ConflictError, InvalidRequestError, NotFoundError
from core.lending import Urgency, VRAMLendingPool


def move_block(engine: ModelEngine, block: str, *, up: bool) -> None:
    """Bring a block of a lower tier to main memory, or send one of main memory to the tier below.

    Raises `InvalidRequestError` for what is no block, `NotFoundError` where there are no tiers or no such block,
    `ConflictError` if it cannot move now.
    """
    try:
        digest = bytes.fromhex(block)
    except ValueError as error:
        raise InvalidRequestError("A block is named by 32 hexadecimal digits.", param="block") from error
    tiers = engine.memory.tiers
    if tiers is None:
        raise NotFoundError("No tiers below the devices are in use (memory.host_bytes, memory.disk_path).")
    where = tiers.memory.find([digest], record=False)
    if not where:
        raise NotFoundError(f"No tier holds block {block}.")
    if not (tiers.memory.promote(digest) if up else tiers.memory.demote(digest)):
        raise ConflictError(f"Block {block} is in {where[0].name} and cannot move {'up' if up else 'down'} now.")


def reclaim(engine: ModelEngine, device: str, nbytes: int | None, urgency: str) -> int:
    """Have a device ask back what it lent. Returns how many bytes will come back.

    Raises `NotFoundError` for an unknown device or where nothing is lent, `UnavailableError` if the engine does not
    come to it.
    """
    lending = _lending(engine, device)
    level = Urgency[urgency.upper()]
    return engine.batcher.intake.call_within(lambda: lending.request_reclaim(device, nbytes, level))


def lend_again(engine: ModelEngine, device: str) -> int:
    """Have a device lend again that took everything back. Returns the bytes that all devices can lend now.

    Raises as `reclaim` does.
    """
    lending = _lending(engine, device)

    def reopen() -> int:
        lending.reopen(device)
        return lending.capacity_bytes()

    return engine.batcher.intake.call_within(reopen)


def _lending(engine: ModelEngine, device: str) -> VRAMLendingPool:
    overflow = engine.memory.overflow
    if overflow is None or device not in {each.name for each in engine.plan.devices}:
        raise NotFoundError(f"{device} lends no memory.")
    return overflow.lending
