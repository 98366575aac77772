"""What `run` is asked, from the command line, files and standard input."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

from core.defaults import DEMO_NAME
from core.errors import ConfigError

MAX_INPUT_BYTES = 4 * 1024 * 1024
"""Of all files and standard input together; more than any context holds."""

_OWNER_AND_NAME = re.compile(r"[^\s/]+/[^\s/]+")


def split_words(words: Sequence[str]) -> tuple[str | None, str | None]:
    """The model and the question that were given as `[MODEL] [QUESTION]`, None for what was not.

    One word alone is a model if there is such a path or it reads `owner/name`, else the question. Raises `ConfigError`.
    """
    if len(words) > 2:
        raise ConfigError(f"run takes a model and a question, not {len(words)} words: put the question in quotes.")
    model, question = [*words, None, None][:2]
    if len(words) == 1 and not _names_a_model(words[0]):
        model, question = None, words[0]
    if question is not None and not question.strip():
        raise ConfigError("the question is empty.")
    return model, question


def _names_a_model(word: str) -> bool:
    if word == DEMO_NAME or _OWNER_AND_NAME.fullmatch(word):
        return True
    try:
        return bool(word.strip()) and Path(word).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a name, no such user, a NUL: nothing that is there
        return False


class Texts:
    """Reads texts that go before a question, until `MAX_INPUT_BYTES` are used up. Raises `ConfigError`."""

    def __init__(self, limit_bytes: int = MAX_INPUT_BYTES) -> None:
        self._limit = limit_bytes
        self._left = limit_bytes

    def of_files(self, paths: Iterable[Path]) -> list[str]:
        texts = []
        for path in paths:
            try:
                with path.expanduser().open("rb") as file:
                    texts.append(self._read(str(path), file))
            except (OSError, RuntimeError) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                raise ConfigError(f"--file {path}: cannot be read: {reason}.") from error
        return texts

    def of_stdin(self) -> str:
        """All of standard input, or nothing if that is a terminal or closed."""
        if sys.stdin is None or sys.stdin.closed or is_keyboard(sys.stdin):
            return ""
        return self._read("standard input", sys.stdin.buffer)

    def _read(self, source: str, file: BinaryIO) -> str:
        data = file.read(self._left + 1)
        if len(data) > self._left:
            raise ConfigError(f"{source}: all text together may have {self._limit} bytes, and this is more.")
        self._left -= len(data)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source}: not text in UTF-8 (byte {error.start} is no character).") from error
        if "\0" in text:
            raise ConfigError(f"{source}: not text (byte {data.index(0)} is NUL).")
        return text.strip("\n")


def is_keyboard(file: TextIO | None) -> bool:
    """Whether somebody types there. A program without standard input has None."""
    return file is not None and not file.closed and file.isatty()


def compose(*parts: str | None) -> str:
    """One question of its parts, those that say something, with an empty line between them."""
    return "\n\n".join(part for part in parts if part is not None and part.strip())
