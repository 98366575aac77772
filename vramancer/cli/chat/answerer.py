"""Who answers: a pipeline in this process, or a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from core.errors import NotFoundError, UnavailableError
from vramancer.cli.client import ApiClient

if TYPE_CHECKING:
    from core.engine.submission import LoadedModel
    from core.inference_pipeline import InferencePipeline

PROMPT_END_TOKENS = 32
"""As many hold any tag that a prompt may end with."""

Message = dict[str, str]

Sampling = dict[str, Any]
"""What was asked for; the rest is left to the model's own defaults."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an answer. `tokens` is how many there are up to here, if that is known; `finish_reason` comes with the
    last piece, and is `length` where the answer was cut off."""

    text: str = ""
    tokens: int | None = None
    finish_reason: str | None = None


class Answerer(Protocol):
    """Something that answers a conversation."""

    @property
    def model_name(self) -> str: ...

    @property
    def shared_at(self) -> str | None:
        """The URL of the server that others use too; None: it is here, and ours alone."""

    def answer(self, messages: list[Message], sampling: Sampling) -> Generator[Piece, None, None]:
        """Pieces as they come. Closing the generator stops the generation."""

    def serves(self, model: str) -> bool:
        """Whether `model` is a name of what is loaded."""

    def switch(self, model: str) -> None:
        """Answer by `model` from now on; what is not loaded is loaded in place of the present model, which goes on if
        that fails. Raises `VRAMancerError`."""


class LocalAnswerer:
    """A pipeline in this process."""

    shared_at = None

    def __init__(self, pipeline: InferencePipeline) -> None:
        self._pipeline = pipeline

    @property
    def model_name(self) -> str:
        return self._pipeline.model.name

    def answer(self, messages: list[Message], sampling: Sampling) -> Generator[Piece, None, None]:
        from core.parsers.answers import tokens_to_keep
        from core.request import SamplingParams

        model = self._pipeline.model
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        defaults = {name: value for name, value in model.generation_defaults.items() if name in known}
        prompt = model.tokenizer.encode_chat(messages, add_generation_prompt=True, context=model.max_model_len)
        kept = tokens_to_keep(model.output_format, has_tools=False)
        params = SamplingParams(**{"kept_special_tokens": kept, **defaults, **sampling})
        read = _without_thoughts(model, prompt)
        handle = self._pipeline.submit(prompt, params)
        tokens = 0
        try:
            for output in handle:
                tokens += sum(len(delta.token_ids) for delta in output.deltas)
                reason = next((delta.finish_reason for delta in output.deltas if delta.finish_reason), None)
                text = "".join(delta.text for delta in output.deltas)
                yield Piece(read(text, reason is not None), tokens, reason)
        finally:
            handle.abort()

    def serves(self, model: str) -> bool:
        return self._pipeline.model.knows(model)

    def switch(self, model: str) -> None:
        if not self.serves(model):
            self._pipeline.load(model)


def _without_thoughts(model: LoadedModel, prompt: list[int]) -> Callable[[str, bool], str]:
    """Takes the text of an answer in pieces, each with whether it is the last, and gives what is no thought of it, as
    a server does."""
    if model.output_format.reasoning_parser is None:
        return lambda text, ended: text
    from core.parsers.answers import AnswerParser
    from core.parsers.events import Text

    end = model.tokenizer.decode(prompt[-PROMPT_END_TOKENS:], skip_special_tokens=False)
    parser = AnswerParser(model.output_format, {}, prompt_end=end)

    def read(text: str, ended: bool) -> str:
        events = [*parser.feed(text), *(parser.finish() if ended else ())]
        return "".join(event.text for event in events if isinstance(event, Text))

    return read


class RemoteAnswerer:
    """A running server. `model` None: whatever it serves."""

    def __init__(self, client: ApiClient, model: str | None) -> None:
        self._client = client
        self.model_name = model or _first_model(client)

    @property
    def shared_at(self) -> str | None:
        return self._client.url

    def answer(self, messages: list[Message], sampling: Sampling) -> Generator[Piece, None, None]:
        body = {
            "model": self.model_name,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **sampling,
        }
        tokens: int | None = None
        with closing(self._client.stream("/v1/chat/completions", body)) as events:  # type: ignore[type-var]
            for event in events:
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                choice: dict[str, Any] = next(iter(event.get("choices", ())), {})
                text = choice.get("delta", {}).get("content") or ""
                yield Piece(text, tokens, choice.get("finish_reason"))

    def serves(self, model: str) -> bool:
        return served_name(self._client, model) is not None

    def switch(self, model: str) -> None:
        name = served_name(self._client, model)
        self.model_name = name or str(self._client.post("/api/models/load", {"model": model})["id"])


def served_name(client: ApiClient, model: str, *, timeout_s: float | None = None) -> str | None:
    """What the server calls the model that is asked for; None if it does not serve that."""
    try:
        card = client.get(f"/v1/models/{quote(model.strip('/'))}", timeout_s=timeout_s)
    except NotFoundError:
        return None
    return str(card["root"])


def _first_model(client: ApiClient) -> str:
    models = client.get("/v1/models")["data"]
    if not models:
        raise UnavailableError(f"{client.url} serves no model: none is loaded there.")
    return str(models[0]["id"])
