"""Grammars compiled for one vocabulary, the last ones kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import llguidance

from core.errors import InvalidRequestError, UnavailableError
from core.grammars import compile_check
from core.grammars.vocabulary import Vocabulary

CPU_S = 2
"""What compiling a grammar may take. Usual ones take milliseconds."""
WAIT_S = 20.0
"""The same on a machine that is busy, and how long a request waits for others' grammars."""
MAX_KEPT = 64
MAX_KEPT_CHARACTERS = 1 << 20
"""Of all grammars that are kept together; compiled, one takes up to a hundred times as much."""
MAX_REASON = 300
ONE_OF = (
    "oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate oneOf with anyOf",
    "oneOf, whose branches do not plainly exclude each other; anyOf may do",
)
"""What llguidance says, and what helps a client."""


class GrammarError(ValueError):
    """llguidance does not take the grammar; the message says why."""


class Grammars:
    """Thread-safe. Nothing is built before the first grammar."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._make = vocabulary
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._checking = threading.Lock()  # one at a time: the other cores are for the model
        self._kept: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._refused: OrderedDict[str, str] = OrderedDict()  # and why, so that asking again costs nothing

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return self._make()

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        return self.vocabulary.build()

    def check(self, grammar: str, param: str, where: Callable[[str], str] = lambda reason: "") -> None:
        """Compile a client's grammar, within limits of time and memory. `where` says what in the request a reason is
        about.

        Raises:
            InvalidRequestError: about `param`; it cannot be compiled, or not within the limits.
            UnavailableError: too many others are being compiled.
        """
        with self._lock:
            if grammar in self._kept:
                return
        try:
            with self._lock:
                refused = self._refused.get(grammar)
            if refused is not None:
                raise GrammarError(refused)
            self._try_elsewhere(grammar)
            self.matcher(grammar)
        except GrammarError as error:
            reason = " ".join(str(error).split()).replace(*ONE_OF)[:MAX_REASON]
            said = f"{param} is nothing that an answer can be made to keep to{where(reason)}: {reason}"
            raise InvalidRequestError(said, param=param) from None

    def _try_elsewhere(self, grammar: str) -> None:
        if not self._checking.acquire(timeout=WAIT_S):
            raise UnavailableError("Too many grammars are being compiled; try again.", retry_after_s=1.0)
        try:
            paths = json.dumps([str(Path(path).resolve()) for path in sys.path])
            done = subprocess.run(
                [sys.executable, "-I", compile_check.__file__, paths, str(CPU_S)], input=grammar.encode(),
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=WAIT_S, check=False, start_new_session=True,
                env=os.environ | {"RAYON_NUM_THREADS": "1"},  # passed on; no setting is read here
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            done = None
        finally:
            self._checking.release()
        if done is None:
            raise UnavailableError("Compiling the grammar takes too long just now; try again.", retry_after_s=WAIT_S)
        error = f"compiling it takes more than {CPU_S} s of a processor's time, or too much memory"
        if not done.returncode:
            error = json.loads(done.stdout)
        if error:
            with self._lock:
                self._refused[grammar] = error[:MAX_REASON]
                while len(self._refused) > MAX_KEPT:
                    self._refused.popitem(last=False)
            raise GrammarError(error)

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher at the beginning of the grammar, the caller's own. Raises `GrammarError`."""
        with self._lock:
            found = self._kept.get(grammar)
            if found is not None:
                self._kept.move_to_end(grammar)
                return found.deep_copy()
        with self._building:  # the tokenizer once, and one grammar at a time
            made = llguidance.LLMatcher(
                self._tokenizer, grammar, log_level=0, limits=compile_check.limits(llguidance)
            )  # fmt: skip
        if made.is_error():
            raise GrammarError(made.get_error())
        with self._lock:
            self._kept[grammar] = made
            while len(self._kept) > MAX_KEPT or sum(map(len, self._kept)) > MAX_KEPT_CHARACTERS:
                self._kept.popitem(last=False)
            return made.deep_copy()
