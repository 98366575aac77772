"""`vramancer run`: chat with a model in the terminal, loaded here or on a running server."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console

from core.config import Settings
from core.errors import VRAMancerError
from vramancer.cli.client import ApiClient
from vramancer.cli.options import settings_command

if TYPE_CHECKING:
    from core.inference_pipeline import InferencePipeline

Message = dict[str, str]
HELP = "/clear forgets the conversation, /exit ends it; Ctrl-C stops an answer."


Sampling = dict[str, Any]
"""What was asked for on the command line; the rest is left to the model's own defaults."""


class Answerer(Protocol):
    """Something that answers a conversation."""

    @property
    def model_name(self) -> str: ...

    def answer(self, messages: list[Message], sampling: Sampling) -> Iterator[str]:
        """Pieces of text as they come. Closing the iterator stops the generation."""


class LocalAnswerer:
    """A pipeline in this process."""

    def __init__(self, pipeline: InferencePipeline) -> None:
        self._pipeline = pipeline

    @property
    def model_name(self) -> str:
        return self._pipeline.model.name

    def answer(self, messages: list[Message], sampling: Sampling) -> Iterator[str]:
        from core.request import SamplingParams

        model = self._pipeline.model
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        defaults = {name: value for name, value in model.generation_defaults.items() if name in known}
        prompt = model.tokenizer.encode_chat(messages, add_generation_prompt=True)
        handle = self._pipeline.submit(prompt, SamplingParams(**{**defaults, **sampling}))
        try:
            for output in handle:
                yield "".join(delta.text for delta in output.deltas)
        finally:
            handle.abort()


class RemoteAnswerer:
    """A running server."""

    def __init__(self, client: ApiClient, model: str | None) -> None:
        self._client = client
        self.model_name = model or str(client.get("/v1/models")["data"][0]["id"])

    def answer(self, messages: list[Message], sampling: Sampling) -> Iterator[str]:
        body = {"model": self.model_name, "messages": messages, "stream": True, **sampling}
        with closing(self._client.stream("/v1/chat/completions", body)) as events:  # type: ignore[type-var]
            for event in events:
                for choice in event.get("choices", ()):
                    yield choice.get("delta", {}).get("content") or ""


@settings_command("model", "devices", "engine", "lending", "memory", "logging", "runtime", model_argument=True)
def run(
    settings: Settings,
    url: Annotated[
        str | None, typer.Option("--url", help="Chat with the server at this URL instead of loading a model.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message to begin with.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens. Not set: the context's end.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, max=2.0, help="Randomness. Not set: the model's own.")
    ] = None,
) -> None:
    """Chat with a model in the terminal. /clear forgets the conversation, /exit ends it; Ctrl-C stops an answer."""
    from core.logs import configure_logging

    configure_logging(settings.logging)
    asked = {"max_tokens": max_tokens, "temperature": temperature}
    sampling = {name: value for name, value in asked.items() if value is not None}
    if url is not None:
        chat(RemoteAnswerer(ApiClient.for_settings(settings, url), settings.model.name), sampling, system, Console())
        return
    from core.inference_pipeline import InferencePipeline

    pipeline = InferencePipeline(settings)
    try:
        pipeline.load()
        chat(LocalAnswerer(pipeline), sampling, system, Console())
    finally:
        pipeline.shutdown()


def chat(answerer: Answerer, sampling: Sampling, system: str | None, console: Console) -> None:
    """Read lines and print answers until /exit, the end of input, or Ctrl-C at the prompt."""
    beginning: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(beginning)
    console.print(f"[bold]{answerer.model_name}[/bold]. {HELP}")
    while (line := _read_line(console)) != "/exit":
        if line == "/clear":
            messages = list(beginning)
        elif line.startswith("/"):
            console.print(HELP)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": _print_answer(answerer, messages, sampling, console)})
            except VRAMancerError as error:
                messages.pop()
                console.print(f"[red]error:[/red] {error.message}")


def _read_line(console: Console) -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return "/exit"


def _print_answer(answerer: Answerer, messages: list[Message], sampling: Sampling, console: Console) -> str:
    """The text printed; after Ctrl-C what had come until then."""
    pieces: list[str] = []
    answer = answerer.answer(messages, sampling)
    try:
        for piece in answer:
            pieces.append(piece)
            console.out(piece, end="", highlight=False)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    finally:
        answer.close()  # type: ignore[attr-defined]
    console.print()
    return "".join(pieces)
