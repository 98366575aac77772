"""The headers `traceparent` and `tracestate` (W3C Trace Context). What is wrong with them is nobody's error: a broken
`traceparent` counts as none, and so does a broken `tracestate`."""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_CHARACTERS = 512
MAX_MEMBERS = 32
SAMPLED = 1

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY = r"[a-z][_0-9a-z\-*/]{0,255}|[a-z0-9][_0-9a-z\-*/]{0,240}@[a-z][_0-9a-z\-*/]{0,13}"
_MEMBER = re.compile(rf"({_KEY})=([\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e])")


class Caller(NamedTuple):
    """The span of a caller: `sampled` says whether its trace is recorded. Ids are hexadecimal."""

    trace_id: str
    span_id: str
    sampled: bool
    state: tuple[tuple[str, str], ...] = ()


def read_caller(parent: str | None, state: str | None) -> Caller | None:
    """The caller that the two headers tell of; None if they tell of none."""
    if parent is None or len(parent) > MAX_CHARACTERS:
        return None
    found = _PARENT.fullmatch(parent.strip(" \t"))
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return Caller(trace_id, span_id, bool(int(flags, 16) & SAMPLED), read_state(state or ""))


def read_state(text: str) -> tuple[tuple[str, str], ...]:
    """What vendors keep in a trace, in order; nothing if any of it is broken."""
    if len(text) > MAX_CHARACTERS:
        return ()
    members = [member for part in text.split(",") if (member := part.strip(" \t"))]
    found = [_MEMBER.fullmatch(member) for member in members]
    pairs = tuple((match[1], match[2]) for match in found if match is not None)
    broken = len(pairs) < len(members) or len(dict(pairs)) < len(pairs) or len(pairs) > MAX_MEMBERS
    return () if broken else pairs


def write_state(pairs: tuple[tuple[str, str], ...]) -> str:
    return ",".join(f"{key}={value}" for key, value in pairs)
