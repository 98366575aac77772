"""Chat templates, rendered by processes of their own.

A template comes with a checkpoint and is a program: it can multiply a string until memory ends, or loop for ever. No
sandbox within this process could stop every way of doing that (most are a single call into C), so transformers renders
it in a worker that has a limit of memory, and that is ended when its time is over. What is rendered is exactly what
`apply_chat_template` gives.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from core.errors import ChatTemplateError, CheckpointError, UnavailableError
from core.logs import get_logger
from core.models import template_worker

logger = get_logger(__name__)

RENDER_S = 5.0
"""A rendering takes milliseconds."""
START_S = 60.0
MAX_WORKERS = 4
WAIT_S = 30.0
"""How long a request waits for a worker while all of them are busy."""
SPARE_CHARACTERS = 4 * 1024 * 1024
MAX_GROWTH = 4
"""A rendering may have so many times the characters of its messages, and some more."""


DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
SPECIAL_TEMPLATES = frozenset({TOOL_TEMPLATE, "rag"})
"""Names that checkpoints with several chat templates give them."""


def template_file(file: Path) -> Any:
    """The template, or the templates by name, in the file that processors of several media keep it in, if any.

    Raises `CheckpointError` for a damaged one.
    """
    if not file.is_file():
        return None
    try:
        template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        return template if isinstance(template, str) else {item["name"]: item["template"] for item in template}
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file.name} of {file.parent.name} is damaged: {error!r}") from error


def by_name(templates: str | dict[str, str] | None) -> dict[str, str]:
    """A checkpoint's templates; one alone is the default."""
    if isinstance(templates, dict):
        return templates
    return {DEFAULT_TEMPLATE: templates} if templates is not None else {}


def choose(templates: Mapping[str, str], messages: Sequence[Mapping[str, Any]], has_tools: bool = False) -> str:
    """Name of the template that a conversation takes: the one for tools if it has tools, calls or results.

    Raises `ChatTemplateError` if there is none, or none is meant for this.
    """
    if not templates:
        raise ChatTemplateError("The model has no chat template; use /v1/completions instead.", param="messages")
    uses_tools = has_tools or any(message.get("role") == "tool" or message.get("tool_calls") for message in messages)
    for name in (TOOL_TEMPLATE, DEFAULT_TEMPLATE) if uses_tools else (DEFAULT_TEMPLATE,):
        if name in templates:
            return name
    plain = [name for name in templates if name not in SPECIAL_TEMPLATES] or list(templates)
    if len(plain) == 1:
        return plain[0]
    raise ChatTemplateError(
        f"The model has several chat templates ({', '.join(sorted(templates))}) and none of them is called "
        f"{DEFAULT_TEMPLATE}; the setting model.chat_template can choose one.",
        param="messages",
    )


def render(template: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    """What transformers makes of `template`, with `options` beside the messages. A content of null is given as null,
    which many templates look for; to one that fails on it, or writes it out, it is given as empty text. Arguments of
    calls are given as objects, and as JSON to one that fails on those.

    Raises:
        ChatTemplateError: the template refuses the messages, or takes more time, memory or room than it may.
        UnavailableError: all workers are busy, for long.
    """
    try:
        return _render_contents(template, messages, options)
    except ChatTemplateError as refused:
        as_text = [_with_argument_texts(message) for message in messages]
        if as_text == list(messages):
            raise
        try:
            return _render_contents(template, as_text, options)
        except ChatTemplateError:
            raise refused from None


def _with_argument_texts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which arguments of calls are JSON."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", {})
        if isinstance(function.get("arguments"), dict):
            function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _render_contents(template: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    """The same with contents of null as the template takes them."""
    filled = [{**message, "content": ""} if message.get("content", "") is None else message for message in messages]
    if filled == list(messages):
        return _render(template, messages, options)
    try:
        text = _render(template, messages, options)
    except ChatTemplateError:
        return _render(template, filled, options)
    try:
        other = _render(template, filled, options)
    except ChatTemplateError:
        return text
    return other if text.count(str(None)) > other.count(str(None)) else text


def _render(template: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    job = {**options, "chat_template": template, "messages": list(messages)}
    size = len(json.dumps([job["messages"], dict(options)]))
    answer = _workers.run({"job": job, "limit": MAX_GROWTH * size + SPARE_CHARACTERS})
    if "text" in answer:
        return cast(str, answer["text"])
    if "broke" in answer:
        logger.error("a chat template broke its limits", reason=answer["broke"])
        raise ChatTemplateError(f"The model's chat template {answer['broke']}.", param="messages")
    raise ChatTemplateError(f"The chat template refused the messages: {answer['error']}", param="messages")


def warm_up() -> None:
    """Have a worker ready for the first rendering. Returns at once."""
    _workers.warm_up()


def worker_pids() -> set[int]:
    """The processes that are there and idle."""
    return _workers.pids()


class _Worker:
    """One process; used by one thread at a time."""

    def __init__(self) -> None:
        self._overdue = False
        self._spoiled = False
        self._ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-I", template_worker.__file__, json.dumps([str(Path(p).resolve()) for p in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the server, which then finishes what it has begun
            # What the server was started with, passed on; no setting is read here.
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def usable(self) -> bool:
        return not (self._overdue or self._spoiled) and self._process.poll() is None

    def run(self, message: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer. Whatever ends it says what the template did."""
        if not self._ready:
            if self._within(START_S, None) != "ready":
                raise UnavailableError("No process could be started that renders the chat template.")
            self._ready = True
        answer = self._within(RENDER_S, message)
        if answer is not None:
            self._spoiled = "broke" in answer  # what it took it may not have given back
            return cast("dict[str, Any]", answer)
        if self._overdue:
            return {"broke": f"takes longer than {RENDER_S:g} s"}
        return {"broke": "ended the process that renders it, by what it took of memory or the stack"}

    def _within(self, seconds: float, message: dict[str, Any] | None) -> Any:
        """Send a message, if there is one, and read one; None: the process has ended, or was, because it took long."""
        assert self._process.stdin is not None and self._process.stdout is not None
        clock = threading.Timer(seconds, self._end_overdue)
        clock.daemon = True
        clock.start()
        try:
            if message is not None:
                self._process.stdin.write(json.dumps(message).encode() + b"\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
            return json.loads(line) if line.endswith(b"\n") else None
        except BrokenPipeError:
            return None
        finally:
            clock.cancel()
            clock.join()

    def _end_overdue(self) -> None:
        self._overdue = True
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not sent any more
                    stream.close()


class _Workers:
    """At most `MAX_WORKERS` of them, kept while they are sound. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(MAX_WORKERS)
        self._idle: list[_Worker] = []
        atexit.register(self.close)

    def warm_up(self) -> None:
        with self._lock:
            if not self._idle:
                self._idle.append(_Worker())

    def pids(self) -> set[int]:
        with self._lock:
            return {worker.pid for worker in self._idle}

    def run(self, message: dict[str, Any]) -> dict[str, Any]:
        if not self._room.acquire(timeout=WAIT_S):
            raise UnavailableError("The processes that render chat templates are all busy.", retry_after_s=RENDER_S)
        try:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is not None and not worker.usable:
                worker.close()
                worker = None
            worker = worker or _Worker()
            try:
                return worker.run(message)
            finally:
                if worker.usable:
                    with self._lock:
                        self._idle.append(worker)
                else:
                    worker.close()
        finally:
            self._room.release()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()


_workers = _Workers()
