"""`CardWatch`: what other programs take of the cards that logical devices are parts of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.devices.device import Device, DeviceBudget
from core.devices.probe import free_bytes_of

PRESSED_BYTES = 256 << 20
_PRESSED_SHARE = 50
"""Once other programs have taken more of a card than they had, so much of it (a fiftieth of a small one) is kept free
for them: what is lent there goes back bit by bit, until they no longer take it."""


class CardWatch:
    """`budgets` by device; `lent` is the purpose of what could be given back there. Made when the stages have been
    loaded: what others have of a card by then is left to them."""

    def __init__(self, devices: Sequence[Device], budgets: Mapping[str, DeviceBudget], lent: str) -> None:
        self._budgets = budgets
        self._lent = lent
        self._cards: dict[str, list[Device]] = {}
        for device in devices:
            self._cards.setdefault(device.torch_device, []).append(device)
        self._left_before = {card: self._left_by_others(card, free) for card, free in self._read().items()}

    def _read(self) -> dict[str, int]:
        """Free bytes by card."""
        return {card: free_bytes_of(parts[0]) for card, parts in self._cards.items()}

    def _left_by_others(self, card: str, free_bytes: int) -> int:
        """What is free or ours."""
        return free_bytes + sum(self._budgets[device.name].used_bytes for device in self._cards[card])

    def external_bytes(self) -> dict[str, int]:
        """By device. What is missing of a card's free memory is charged to its parts by what each may use, lent memory
        included."""
        found: dict[str, int] = {}
        for card, free in self._read().items():
            parts = self._cards[card]
            kept = min(PRESSED_BYTES, sum(device.memory_limit_bytes for device in parts) // _PRESSED_SHARE)
            if self._left_by_others(card, free) < self._left_before[card] - kept:  # they have taken more
                free -= kept
            budgets = [self._budgets[device.name] for device in parts]
            shares = [budget.free_bytes + budget.used_by_purpose().get(self._lent, 0) for budget in budgets]
            missing = max(0, sum(budget.free_bytes for budget in budgets) - free)
            for device, share in zip(parts, shares, strict=True):
                found[device.name] = missing * share // max(1, sum(shares))
        return found
