"""JSON that comes in pieces, read strictly, character by character."""

from __future__ import annotations

import re

MAX_DEPTH = 64
_SPACE = " \t\n\r"
_IN_STRING = re.compile(r'["\\\x00-\x1f]')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_NUMBER_LETTERS = frozenset("+-.0123456789eE")
_WORDS = ("true", "false", "null")


class JsonScanner:
    """Finds where a JSON object or list ends, and whether it is one: `done`, or `broken` at the first character that
    cannot be part of it. Work is proportional to the text.

    Line breaks and other control characters within strings, which JSON does not have and models write, are escaped.
    """

    def __init__(self, *, inside_object: bool = False) -> None:
        """`inside_object`: begins behind a value of an object."""
        self.done = False
        self.broken = False
        self._stack = ["{"] if inside_object else []
        self._expects = "more" if inside_object else "start"
        self._token = ""  # number or word that has begun
        self._hex_left = 0  # digits of a \u escape that are still to come

    def feed(self, text: str, start: int, end: int) -> tuple[str, int]:
        """Read `text[start:end]`. Returns JSON that has been read, and where it stopped: at the end, behind the value,
        or at what is none of it."""
        out: list[str] = []
        at = start
        while at < end and not (self.done or self.broken):
            if self._expects in ("string", "key string"):
                piece, at = self._in_string(text, at, end)
                out.append(piece)
                continue
            letter = text[at]
            if self._token and not self._goes_on(letter):
                continue  # what ended it is read next
            if not self._token:
                self._take(letter)
            if not self.broken:
                out.append(letter)
                at += 1
        return "".join(out), at

    def _in_string(self, text: str, at: int, stop: int) -> tuple[str, int]:
        """A piece of a string, up to its end at most."""
        letter = text[at]
        if self._hex_left:
            self.broken = letter not in "0123456789abcdefABCDEF"
            self._hex_left -= 1
            return ("", at) if self.broken else (letter, at + 1)
        if self._token == "\\":
            self._token = ""
            self._hex_left = 4 if letter == "u" else 0
            self.broken = letter not in '"\\/bfnrtu'
            return ("", at) if self.broken else (letter, at + 1)
        found = _IN_STRING.search(text, at, stop)
        end = found.start() if found is not None else stop
        if end > at:
            return text[at:end], end
        if letter == '"':
            self._expects = "colon" if self._expects == "key string" else "more"
            return letter, at + 1
        if letter == "\\":
            self._token = letter
            return letter, at + 1
        return f"\\u{ord(letter):04x}" if letter not in "\n\r\t" else repr(letter)[1:-1], at + 1

    def _goes_on(self, letter: str) -> bool:
        """Whether the number or word that has begun goes on with this letter. If not, it has ended, or is broken."""
        if self._token[0] in "-0123456789":
            if letter in _NUMBER_LETTERS:
                self._token += letter
                return True
            self.broken = _NUMBER.fullmatch(self._token) is None
        elif any(word.startswith(self._token + letter) for word in _WORDS):
            self._token += letter
            return True
        else:
            self.broken = self._token not in _WORDS
        self._token = ""
        self._expects = "more"
        return False

    def _take(self, letter: str) -> None:
        """A letter outside of strings, numbers and words."""
        if letter in _SPACE:
            return
        expects = self._expects
        if letter == '"' and expects in ("value", "value or end", "key", "key or end"):
            self._expects = "string" if expects.startswith("value") else "key string"
        elif letter in "{[" and expects in ("start", "value", "value or end") and len(self._stack) < MAX_DEPTH:
            self._stack.append(letter)
            self._expects = "key or end" if letter == "{" else "value or end"
        elif letter in "]}" and expects in ("more", "value or end", "key or end"):
            self._close(letter)
        elif letter == "," and expects == "more":
            self._expects = "key" if self._stack[-1] == "{" else "value"
        elif letter == ":" and expects == "colon":
            self._expects = "value"
        elif letter in "-0123456789tfn" and expects in ("value", "value or end"):
            self._token = letter
        else:
            self.broken = True

    def _close(self, letter: str) -> None:
        self.broken = self._stack[-1] + letter not in ("{}", "[]")
        if not self.broken:
            self._stack.pop()
            self._expects = "more"
            self.done = not self._stack
