"""A conversation: what was said, and how the next answer is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from vramancer.cli.chat.answerer import Answerer, Message, Sampling
from vramancer.cli.chat.inputs import compose
from vramancer.cli.chat.screen import Answer, Screen


class Conversation:
    """Questions and answers with one answerer. `before` is text that goes before the first question."""

    def __init__(
        self, answerer: Answerer, screen: Screen, sampling: Sampling, system: str | None = None, before: str = ""
    ) -> None:
        self.answerer = answerer
        self.screen = screen
        self.sampling = dict(sampling)
        self.system = system
        self._before = before
        self._turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The system message, if there is one, then the turns; as OpenAI's API takes them."""
        beginning = [] if self.system is None else [{"role": "system", "content": self.system}]
        return beginning + self._turns

    def ask(self, question: str) -> Answer:
        """Show the answer to a question, and remember both. Raises `VRAMancerError`; the question is then forgotten."""
        turns = self._turns
        question = compose(self._before, question)
        self._turns = [*turns, {"role": "user", "content": question}]
        try:
            answer = self.screen.answer(self.answerer.answer(self.messages, self.sampling))
        except BaseException:
            self._turns = turns
            raise
        self._turns.append({"role": "assistant", "content": answer.text})
        self._before = ""
        if answer.summary():
            self.screen.note(answer.summary())
        return answer

    def clear(self) -> None:
        """Forget what was said. The system message and what is set stay."""
        self._turns = []

    def save(self, path: Path) -> None:
        """Write a new file that `POST /v1/chat/completions` takes as its body. Raises `ConfigError`."""
        body: dict[str, Any] = {"model": self.answerer.model_name, "messages": self.messages, **self.sampling}
        try:
            with path.expanduser().open("x", encoding="utf-8") as file:
                json.dump(body, file, indent=2, ensure_ascii=False)
                file.write("\n")
        except FileExistsError as error:
            raise ConfigError(f"{path} is there already; give another name.") from error
        except (OSError, RuntimeError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise ConfigError(f"{path} cannot be written: {reason}.") from error
