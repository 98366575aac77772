"""Going on with a stream whose replica was lost, at another replica, where that is exact.

Prompt and text so far do not give the tokens so far: text may be cut into tokens in several ways, and chat templates,
stop strings, penalties and limits depend on where the prompt ends. So another replica is given the whole request again,
and what it writes is compared with what the client has been told. As long as both are the same nothing is sent; from
there on its answer goes on. If they differ, the stream ends with an error. What the client has is then always one
replica's answer to its request, from the first character to the last.

Only requests whose answer is determined are worth that: greedy, or with a seed, on VRAMancers, whose random numbers are
hashes of seed and position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from core.errors import UpstreamError

TEXTS = ("reasoning_content", "content", "text")
MAX_TOLD = 1 << 20
"""Characters that are kept of a stream, in order to compare."""


def is_determined(body: Mapping[str, Any]) -> bool:
    """Whether the request would be answered alike again, and its stream is one that can be compared."""
    greedy = body.get("temperature") in (0, 0.0) and type(body.get("temperature")) in (int, float)
    single = all(body.get(name) in (None, 1) for name in ("n", "best_of"))
    return (greedy or type(body.get("seed")) is int) and single and isinstance(body.get("prompt", ""), str)


class Told:
    """What a client has been told of one stream: how it began, and its texts by field."""

    def __init__(self) -> None:
        self.comparable = True
        self.nothing = True
        self._head: dict[str, Any] = {}
        self._texts = dict.fromkeys(TEXTS, "")
        self._matched: dict[str, int] = {}
        self._comparing = False

    def add(self, values: Mapping[str, Any]) -> None:
        """An event has been sent."""
        if self.nothing:
            self.nothing = False
            self._head = {name: values[name] for name in ("id", "created") if name in values}
        if not self.comparable:
            return
        parts = _parts(values)
        if parts is None or sum(map(len, self._texts.values())) > MAX_TOLD:
            self.comparable = False
            return
        for name, text in parts.items():
            self._texts[name] += text

    def begin_again(self) -> None:
        """From now on events of another replica are compared."""
        self._matched = dict.fromkeys(TEXTS, 0)
        self._comparing = not self.nothing

    def rest(self, text: bytes, values: dict[str, Any]) -> tuple[bytes, dict[str, Any]] | None:
        """What the client has not been told of this event of another replica; None: nothing.

        Raises:
            UpstreamError: it says something else than the client has been told.
        """
        if not self._comparing:
            return (text, values) if self.nothing else self._as_before(values)
        parts, fresh = _parts(values), False
        if parts is None:  # such as a call of a tool, which the client has not been told of
            parts, fresh = {}, True
        for name, part in parts.items():
            told = self._texts[name][self._matched[name] :]
            same = min(len(told), len(part))
            if part[:same] != told[:same]:
                raise _differs()
            self._matched[name] += same
            _cut(values, name, same)
            fresh = fresh or len(part) > same
        ends = _ends(values)
        if not fresh and not ends:
            return None
        if self._awaited():
            raise _differs()
        self._comparing = False
        return self._as_before(values)

    def _awaited(self) -> bool:
        return any(self._matched[name] < len(text) for name, text in self._texts.items())

    def _as_before(self, values: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        values.update(self._head)
        return msgspec.json.encode(values), values


def _differs() -> UpstreamError:
    return UpstreamError(
        "The replica that answered was lost, and another one would have answered otherwise; the stream ends here.",
        code="upstream_lost",
    )


def _choice(values: Mapping[str, Any]) -> Any:
    choices = values.get("choices")
    return choices[0] if isinstance(choices, list) and len(choices) == 1 else None


def _parts(values: Mapping[str, Any]) -> dict[str, str] | None:
    """Texts of an event by field; None if there is more to it than texts."""
    if values.get("choices") == []:
        return {}
    choice = _choice(values)
    if not isinstance(choice, dict) or choice.get("logprobs") is not None:
        return None
    found = {"text": choice["text"]} if "text" in choice else {}
    delta = choice.get("delta")
    for name, value in delta.items() if isinstance(delta, dict) else ():
        if name in TEXTS:
            found[name] = value
        elif name != "role" and value not in (None, [], ""):
            return None
    found = {name: text for name, text in found.items() if text is not None}
    return found if all(isinstance(text, str) for text in found.values()) else None


def _cut(values: Mapping[str, Any], name: str, length: int) -> None:
    choice = _choice(values)
    holder = choice if name == "text" else choice["delta"]
    holder[name] = holder[name][length:]


def _ends(values: Mapping[str, Any]) -> bool:
    choice = _choice(values)
    return isinstance(choice, dict) and choice.get("finish_reason") is not None
