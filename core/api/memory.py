"""Memory: who holds what, which tiers keep which blocks, and moving them by call."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

from flask import Blueprint, Response, request
from pydantic import ConfigDict, Field

from core.api.body import Integer, RequestModel, json_response, read_request, reads
from core.api.context import api_context
from core.engine import memory_calls
from core.errors import InvalidRequestError
from core.security.access import policy
from core.views.memory import memory_view
from core.views.render import render

blueprint = Blueprint("memory", __name__)

MAX_BLOCKS = 1000
MAX_DETAIL = 64


class ReclaimRequest(RequestModel):
    """`/api/memory/reclaim`: `bytes` left out is all that the device lent, and it lends no more."""

    model_config = ConfigDict(extra="forbid")

    device: str = Field(min_length=1, max_length=256)
    bytes: Integer | None = Field(None, ge=1, le=1 << 50)
    urgency: Literal["low", "medium", "high", "critical"] = "medium"


class LendRequest(RequestModel):
    """`/api/memory/lend`."""

    model_config = ConfigDict(extra="forbid")

    device: str = Field(min_length=1, max_length=256)


@blueprint.get("/api/memory")
@policy("viewer")
def memory() -> Response:
    """Bytes per device, leases, tiers. `?blocks=N` adds the N hottest blocks of each tier below the devices."""
    text = request.args.get("blocks", "0")
    if not text.isascii() or not text.isdigit() or int(text) > MAX_BLOCKS:
        raise InvalidRequestError(f"blocks is a number from 0 to {MAX_BLOCKS}.", param="blocks")
    return json_response(render(memory_view(api_context().pipeline.current_engine, int(text))))


def _task(kind: str, detail: str) -> AbstractContextManager[None]:
    tasks = api_context().pipeline.metrics.tasks
    return tasks.run(kind, detail[:MAX_DETAIL], priority="low", resource="memory")


@blueprint.post("/api/memory/blocks/<block>/promote")
@policy("operator", mutates=True, waits=True)
def promote(block: str) -> Response:
    """Bring a block of a lower tier to main memory."""
    with _task("promote", block):
        memory_calls.move_block(api_context().pipeline.engine, block, up=True)
    return json_response({"block": block, "status": "promoted"})


@blueprint.post("/api/memory/blocks/<block>/demote")
@policy("operator", mutates=True, waits=True)
def demote(block: str) -> Response:
    """Send a block of main memory, and what continues it, to the tier below."""
    with _task("demote", block):
        memory_calls.move_block(api_context().pipeline.engine, block, up=False)
    return json_response({"block": block, "status": "demoted"})


@blueprint.post("/api/memory/reclaim")
@policy("operator", mutates=True, waits=True)
@reads(ReclaimRequest)
def reclaim() -> Response:
    """Have a device take back memory that it lent; requests go on, their blocks move."""
    fields = read_request(ReclaimRequest)
    with _task("reclaim", fields.device):
        granted = memory_calls.reclaim(api_context().pipeline.engine, fields.device, fields.bytes, fields.urgency)
    return json_response({"device": fields.device, "bytes": granted, "urgency": fields.urgency})


@blueprint.post("/api/memory/lend")
@policy("operator", mutates=True, waits=True)
@reads(LendRequest)
def lend() -> Response:
    """Have a device lend again that took everything back. `bytes`: what all devices can lend now."""
    fields = read_request(LendRequest)
    lendable = memory_calls.lend_again(api_context().pipeline.engine, fields.device)
    return json_response({"device": fields.device, "bytes": lendable})
