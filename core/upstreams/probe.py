"""Looking at other servers: whether they are there, what they are, which models they have, how loaded they are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from core.config_backend import BackendKind
from core.errors import UpstreamError, UpstreamTimeoutError, VRAMancerError
from core.upstreams.replica import Replica, Reported
from core.upstreams.transport import END, Exchange, Head, Timeouts, Transport

MAX_PROBE_BYTES = 4 << 20
OWNERS: Mapping[str, BackendKind] = {
    "vramancer": "vramancer", "vllm": "vllm", "llamacpp": "llama.cpp", "library": "ollama",
}  # fmt: skip
"""What servers say in a model's `owned_by`."""


def probe(replicas: Sequence[Replica], transport: Transport, timeout_s: float) -> None:
    """Look at all of them at the same time, and note at each what was found. Raises nothing."""
    deadline_s = time.monotonic() + timeout_s
    asked = [(replica, _ask(replica, transport, f"{replica.base_url}/models", timeout_s)) for replica in replicas]
    for replica, exchange in asked:
        try:
            _note_models(replica, _answer(exchange, deadline_s))
        except VRAMancerError as error:
            replica.reachable, replica.trouble, replica.reported = False, error.message, None
        else:
            replica.reachable, replica.trouble = True, None
    peers = [replica for replica in replicas if replica.reachable and replica.kind == "vramancer"]
    deadline_s = time.monotonic() + timeout_s
    loads = [[_ask(peer, transport, peer.root_url + path, timeout_s) for path in LOAD_ROUTES] for peer in peers]
    for peer, (queue, batcher) in zip(peers, loads, strict=True):
        try:
            peer.reported = _reported(_answer(queue, deadline_s), _answer(batcher, deadline_s))
        except VRAMancerError:
            peer.reported = None  # it need not let us see that
        finally:
            batcher.close()


LOAD_ROUTES = ("/api/queue/status", "/api/batcher/stats")


def _ask(replica: Replica, transport: Transport, url: str, timeout_s: float) -> Exchange:
    headers = {"Accept": "application/json", **replica.headers}
    return transport.open("GET", url, headers=headers, body=None, timeouts=Timeouts(timeout_s, timeout_s))


def _answer(exchange: Exchange, deadline_s: float) -> dict[str, Any]:
    """A JSON object. Raises `UpstreamError`."""
    pieces, status = bytearray(), 0
    try:
        while (item := exchange.next(max(0.0, deadline_s - time.monotonic()))) is not END:
            if item is None:
                raise UpstreamTimeoutError("It does not say in time which models it has.")
            if isinstance(item, Head):
                status = item.status
            elif isinstance(item, bytes):
                pieces += item
            if len(pieces) > MAX_PROBE_BYTES:
                raise UpstreamError("Its list of models is too long.", code="upstream_too_large")
    finally:
        exchange.close(rest=True)
    if status != 200:
        raise UpstreamError(f"Asked for its models, it answers with status {status}.")
    try:
        values = msgspec.json.decode(bytes(pieces))
    except (msgspec.DecodeError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UpstreamError("Asked for its models, it does not answer a JSON object.", code="upstream_bad_answer")
    return values


def _note_models(replica: Replica, values: Mapping[str, Any]) -> None:
    """Find the model that the replica stands for. Raises `UpstreamError` where it is not there."""
    data = values.get("data")
    cards = [card for card in data if isinstance(card, dict)] if isinstance(data, list) else []
    owners = {card["id"]: card.get("owned_by") for card in cards if isinstance(card.get("id"), str)}
    wanted = replica.settings.model or replica.settings.name
    if replica.settings.model is None and wanted not in owners and len(owners) == 1:
        wanted = next(iter(owners))
    if wanted not in owners and f"{wanted}:latest" in owners:  # as Ollama calls what has no tag
        wanted = f"{wanted}:latest"
    if wanted not in owners:
        shown = ", ".join(sorted(owners)[:20]) or "none"
        raise UpstreamError(f"It has no model {wanted!r}; it has: {shown}.", code="upstream_no_model")
    replica.model = wanted
    if replica.settings.backend == "auto":
        owner = owners[wanted]
        replica.kind = OWNERS.get(owner, "openai") if isinstance(owner, str) else "openai"


def _reported(queue: Mapping[str, Any], batcher: Mapping[str, Any]) -> Reported | None:
    """Of a VRAMancer; None if it says something else."""
    values: list[Any] = [queue.get(name) for name in ("running", "waiting", "prompt_tokens")]
    values.append(batcher.get("max_batch_size"))
    if not all(type(value) is int and 0 <= value < 1 << 40 for value in values):
        return None
    running, waiting, tokens, most = values
    return Reported(running, waiting, tokens * waiting // max(1, running + waiting), most)
