"""Bytes that begin a character, by trying everything."""

from __future__ import annotations

RESTS = tuple(bytes([first, *more]) for first in (0x80, 0x90, 0xA0) for more in ((), (0x80,), (0x80, 0x80)))


def unfinished(data: bytes) -> int:
    """How many bytes at the end of `data` begin a character that has more."""
    return next((size for size in (1, 2, 3) if size <= len(data) and _begins(data[len(data) - size :])), 0)


def _begins(tail: bytes) -> bool:
    for rest in RESTS:
        try:
            if len((tail + rest).decode()) == 1:
                return True
        except UnicodeDecodeError:
            continue
    return False
