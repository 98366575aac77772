"""What the keys do: which page is shown and which request is selected."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vramancer.cli.live.watch import Seen

OVERVIEW, DEVICES, REQUESTS, TIERS = 1, 2, 3, 4
PAGES = {OVERVIEW: "overview", DEVICES: "devices", REQUESTS: "requests", TIERS: "memory"}
ANY = "any"
"""Stands for every key without a meaning of its own."""
KEYS = (
    *map(str, PAGES), "?", "q", "space", "tab", "s-tab", "up", "down", "pageup", "pagedown", "home", "end", "j", "k",
    "c", "y", "n", "escape", "enter",
)  # fmt: skip
_STEPS = {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -10, "pagedown": 10, "home": -1_000_000, "end": 1_000_000}


class Act(Enum):
    """What a key asks of others than the picture."""

    LEAVE = "leave"
    PAUSE = "pause"
    CANCEL = "cancel"


@dataclass(slots=True)
class Controls:
    """The state of the keys. `asking` is the request that is to be cancelled once that is confirmed, `note` what is
    said below the picture until the next key; `scroll` are lines above the window, of pages that are longer."""

    page: int = OVERVIEW
    help: bool = False
    selected: str | None = None
    scroll: int = 0
    asking: str | None = None
    note: str = ""
    _row: int = field(default=0)

    def settle(self, seen: Seen) -> None:
        """After a look: the selected request, or else the one that has taken its place."""
        names = [request.id for request in seen.look.queue.requests]
        if self.selected in names:
            self._row = names.index(self.selected)
        else:
            self._row = max(0, min(self._row, len(names) - 1))
            self.selected = names[self._row] if names else None

    def press(self, key: str, seen: Seen) -> tuple[Act, str] | None:
        """Act on a key; what others are to do, and of which request."""
        self.note = ""
        if self.asking is not None:
            asked, self.asking = self.asking, None
            if key == "y":
                self.note = f"cancelling {asked}"
                return Act.CANCEL, asked
            self.note = "nothing is cancelled"
            return None
        self.settle(seen)
        if key == "q":
            return Act.LEAVE, ""
        if key == "space":
            return Act.PAUSE, ""
        if key == "?":
            self.help, self.scroll = not self.help, 0
        elif key == "escape":
            self.help, self.scroll = False, 0
        elif key.isdigit() and int(key) in PAGES:
            self._turn_to(int(key))
        elif key in ("tab", "s-tab"):
            self._turn_to((self.page - 1 + (1 if key == "tab" else -1)) % len(PAGES) + 1)
        elif key in _STEPS:
            self._step(_STEPS[key], seen)
        elif key == "c":
            self._ask(seen)
        return None

    def _turn_to(self, page: int) -> None:
        self.page, self.help, self.scroll = page, False, 0

    def _step(self, by: int, seen: Seen) -> None:
        names = [request.id for request in seen.look.queue.requests]
        if self.page != REQUESTS or self.help:
            self.scroll = max(0, self.scroll + by)
        elif names:
            self._row = max(0, min(len(names) - 1, self._row + by))
            self.selected = names[self._row]

    def _ask(self, seen: Seen) -> None:
        if self.help or self.page != REQUESTS:
            self.note = f"requests are cancelled on page {REQUESTS}"
        elif self.selected is None:
            self.note = "there is no request"
        else:
            self.asking = self.selected
