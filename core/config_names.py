"""Names that people write where a setting is expected: those that do not work in this version, and slips of the pen."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_NEAR = 0.75
"""Least of `difflib`'s ratios: four letters of which two have changed places reach it."""
_SLIPS = 2
"""Most letters of two words that have no match in the other: one changed or moved letter makes two, one that is missing
or too much makes one. Long names that mean different things may be alike by ratio, and differ by more than that."""


def nearest(word: str, known: Iterable[str], *, prefix: str = "") -> str | None:
    """The one of `known` that was probably meant by `word`: it differs by a slip, or is cut off or goes on. None if
    none is near.

    Case, and `-` or `_`, make no difference. `prefix` begins every name, so it says nothing about likeness.
    """
    plain, text = {_plain(name.removeprefix(prefix)): name for name in known}, _plain(word.removeprefix(prefix))
    for match in difflib.get_close_matches(text, plain, cutoff=_NEAR):
        blocks = difflib.SequenceMatcher(None, text, match).get_matching_blocks()
        slips = len(text) + len(match) - 2 * sum(block.size for block in blocks)
        if slips <= _SLIPS or text.startswith(match) or match.startswith(text):
            return plain[match]
    return None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


@dataclass(frozen=True, slots=True)
class AbsentSetting:
    """A setting whose name is taken and which does nothing yet.

    Attributes:
        key, env: its names in YAML and in the environment.
        purpose: what it is for.
        off: values, as text, by which nothing is asked of it; not set is another.
    """

    key: str
    env: str
    purpose: str
    off: frozenset[str] = frozenset()

    def is_off(self, value: Any) -> bool:
        """Whether `value`, from YAML or the environment, asks for nothing."""
        return value is None or str(value).strip().lower() in self.off | {""}


_SWITCH = frozenset({"0", "false", "off"})

ABSENT_SETTINGS = (AbsentSetting("sqlite.path", "VRM_SQLITE_PATH", "keeping state in an SQLite file", _SWITCH),)

ABSENT_COMMANDS = {"keys": "API keys with roles of their own"}


def absence(name: str, purpose: str) -> str:
    """What there is to say of a name that does not work yet."""
    return f"{name} ({purpose}) is not in this version"
