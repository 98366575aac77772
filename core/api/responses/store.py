"""Responses that clients may come back to, in main memory: `MAX_RESPONSES` and `MAX_BYTES` of each caller, and
`MAX_TOTAL_BYTES` of all, whichever is reached first; the least recently used go first, and all with the process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, TypeAlias

from core.api.body import to_json
from core.errors import NotFoundError

MAX_RESPONSES = 1000
MAX_BYTES = 64 * 1024 * 1024
"""As JSON."""
MAX_TOTAL_BYTES = 256 * 1024 * 1024
MAX_CHAIN = MAX_RESPONSES


@dataclass(frozen=True, slots=True)
class Stored:
    """A response as its client sees it, the items it was asked with, and the generation that makes it, while one
    does."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    generation_id: str | None = None

    @property
    def size_bytes(self) -> int:
        return len(to_json([self.response, self.items]).encode())


Kept: TypeAlias = OrderedDict[str, tuple[Stored, int]]


class ResponseStore:
    """Any thread. What is in it is replaced, never changed."""

    def __init__(
        self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES, max_total_bytes: int = MAX_TOTAL_BYTES
    ) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._max_total_bytes = max_total_bytes
        self._lock = threading.Lock()
        self._kept: dict[str, Kept] = {}
        """By owner and id, with its bytes; last used last."""
        self._order: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._bytes: dict[str, int] = {}

    def put(self, owner: str, stored: Stored) -> None:
        """Keep it in place of what has its id, and give up others for it."""
        self._put(owner, stored, anew=True)

    def replace(self, owner: str, stored: Stored) -> None:
        """`put`, if it was not deleted meanwhile."""
        self._put(owner, stored, anew=False)

    def _put(self, owner: str, stored: Stored, *, anew: bool) -> None:
        size = stored.size_bytes
        name = str(stored.response["id"])
        with self._lock:
            if not self._drop(owner, name) and not anew:
                return
            kept: Kept = self._kept.setdefault(owner, OrderedDict())
            kept[name] = (stored, size)
            self._order[owner, name] = None
            self._bytes[owner] = self._bytes.get(owner, 0) + size
            while owner in self._kept and (len(kept) > self._max_responses or self._bytes[owner] > self._max_bytes):
                self._drop(owner, next(iter(kept)))
            while sum(self._bytes.values()) > self._max_total_bytes:
                self._drop(*next(iter(self._order)))

    def get(self, owner: str, response_id: str) -> Stored:
        """Raises `NotFoundError` if it is not kept for this owner."""
        with self._lock:
            kept = self._kept.get(owner) or Kept()
            if response_id not in kept:
                raise self._not_kept(response_id)
            self._touch(owner, response_id)
            return kept[response_id][0]

    def delete(self, owner: str, response_id: str) -> None:
        """Raises `NotFoundError` if it is not kept for this owner."""
        with self._lock:
            if not self._drop(owner, response_id):
                raise self._not_kept(response_id)

    def conversation(self, owner: str, response_id: str) -> list[dict[str, Any]]:
        """Items of a response and of those before it, oldest first. Raises `NotFoundError` if one of them is gone."""
        chain: list[Stored] = []
        name: str | None = response_id
        while name is not None and len(chain) < MAX_CHAIN:
            chain.append(self.get(owner, name))
            name = chain[-1].response["previous_response_id"]
        items: list[dict[str, Any]] = []
        for stored in reversed(chain):
            items += [*stored.items, *stored.response["output"]]
        return items

    def items(self, owner: str) -> dict[str, dict[str, Any]]:
        """Items of the owner's responses, by their ids; of those with one id that of the response used last."""
        with self._lock:
            kept = [stored for stored, _ in (self._kept.get(owner) or Kept()).values()]
        return {
            item["id"]: item
            for stored in kept
            for item in (*reversed(stored.items), *reversed(stored.response["output"]))
        }

    def __len__(self) -> int:
        return len(self._order)

    def _touch(self, owner: str, name: str) -> None:
        self._kept[owner].move_to_end(name)
        self._order.move_to_end((owner, name))

    def _drop(self, owner: str, name: str) -> bool:
        kept = self._kept.get(owner)
        if kept is None or name not in kept:
            return False
        _, size = kept.pop(name)
        del self._order[owner, name]
        self._bytes[owner] -= size
        if not kept:
            del self._kept[owner], self._bytes[owner]
        return True

    def _not_kept(self, response_id: str) -> NotFoundError:
        return NotFoundError(
            f"No response {response_id[:64]!r} is kept. This server keeps the last {self._max_responses} responses of "
            f"a key, {self._max_bytes >> 20} MiB at most, in memory until it ends, unless store was false.",
            param="response_id",
        )
