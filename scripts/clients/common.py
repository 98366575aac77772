"""What the checks of all clients share. Each client's file runs in that client's own environment, so this imports the
standard library alone.

A check is a function that is called at once and prints one line of JSON: its name, what served it, and how it went.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, WIT, LENGTH, SERVER = "ok", "wit", "length", "server"
CUT_OFF = frozenset({"LengthFinishReasonError", "IncompleteOutputException", "IncompleteToolCall", "Cut"})
"""Exceptions by which clients say that an answer was cut off, and our own."""
MAX_DETAIL = 300

CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Lima", "Rome"]}},
        "required": ["city"], "additionalProperties": False}  # fmt: skip
WEATHER = {"name": "weather", "description": "Says what the weather in a city is.", "parameters": CITY}
TOOL = {"type": "function", "function": WEATHER}
QUESTION = "What is the capital of France?"
ASKED: Any = [{"role": "user", "content": QUESTION}]
RAIN: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
TOLD = "It rains in Oslo."
"""What the scripted model says once a tool has answered it."""
GREETING = "Hello from the scripted model."
"""What it says where it is offered no tool that it knows."""


class Wit(Exception):
    """The answer is well formed, and it is the model that said something else than was hoped for."""


class Cut(Exception):
    """The answer reached its limit of tokens before its end."""


@dataclass(frozen=True)
class Served:
    """A server and the model that it serves. `url` is without `/v1`."""

    url: str
    model: str
    token: str
    embedding: str = ""

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


def served(name: str) -> Served:
    """The server called demo or scripted, as the runner has put it into the environment."""
    return Served(**json.loads(os.environ[f"CHECK_{name.upper()}"]))


def outcome_of(error: BaseException, *, constrained: bool) -> str:
    """What a failed check tells of. A model has no choice in an answer that is constrained, so that one that is wrong
    there is the server's fault, unless it was cut off."""
    if {type(each).__name__ for each in _chain(error)} & CUT_OFF:
        return LENGTH
    return WIT if isinstance(error, Wit) and not constrained else SERVER


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and those that it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def check(name: str, on: str = "demo", *, constrained: bool = False) -> Callable[[Callable[[], Any]], None]:
    """Run what is decorated, against the server `on`. What it returns is shown."""

    def run(function: Callable[[], Any]) -> None:
        try:
            outcome, detail = OK, str(function())
        except Exception as error:  # noqa: BLE001  whatever a client raises is how its check went
            outcome, detail = outcome_of(error, constrained=constrained), f"{type(error).__name__}: {error}"
        line = {"check": name, "on": on, "constrained": constrained, "outcome": outcome}
        shown = json.dumps({**line, "detail": " ".join(detail.split())[:MAX_DETAIL]})
        print(f"\n{shown}", flush=True)  # on a line of its own, wherever a client has left the one before

    return run


def same(found: Any, expected: Any) -> Any:
    """`found`, which has to be this: else the server is at fault."""
    assert found == expected, f"{found!r} is not {expected!r}"
    return found


def hoped(text: str, word: str = "Paris") -> str:
    """`text`, in which a model of some wit says `word`."""
    if word not in text:
        raise Wit(f"{text!r} has no {word!r}")
    return text


def whole(reason: str | None, *reasons: str) -> None:
    """Raises `Cut` for an answer that was cut off, and an error for one that ended in another way than `reasons`."""
    if reason == "length":
        raise Cut(reason)
    assert reason in reasons, f"it ended for {reason!r}, not for {' or '.join(reasons)}"


def in_cities(arguments: str | dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of `weather` that match its schema."""
    given: dict[str, Any] = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert list(given) == ["city"] and given["city"] in CITY["properties"]["city"]["enum"], given
    return given


def program(name: str, *arguments: str, home: Path, timeout_s: float = 600.0, **environment: str) -> str:
    """What a program says, run with a home of its own. Raises unless it ends well."""
    found = shutil.which(name)
    assert found is not None, f"{name} is not installed"
    home.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [found, *arguments], cwd=home, capture_output=True, text=True, timeout=timeout_s, check=False,
        stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb", "NO_COLOR": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}: {(done.stderr or done.stdout)[-MAX_DETAIL:]}"
    return done.stdout
