"""Answers with tool calls and reasoning: whole messages, and deltas that OpenAI's clients put together again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from core.api.generation import choice
from core.parsers.answers import AnswerParser, tokens_to_keep
from core.parsers.events import Arguments, CallStart, Event, Reasoning, merged
from core.parsers.families import parser_class
from core.parsers.reasoning import TAGS, begins_open
from core.request import Completion, FinishReason, SequenceDelta

if TYPE_CHECKING:
    from core.api.openai.tools import Offer
    from core.engine.submission import LoadedModel

PROMPT_END_TOKENS = 32
"""As many hold any tag that a prompt may end with."""


def reasoning_tokens(model: LoadedModel, thoughts: Iterable[str], completion_tokens: int) -> int:
    """Tokens of texts, of `completion_tokens` in all. They are counted in the text, which a model may have written in
    more tokens than it takes."""
    counted = sum(len(model.tokenizer.encode(text, add_special_tokens=False)) for text in thoughts if text)
    return min(counted, completion_tokens)


class AnswerReader:
    """Reads the answers to one request, each with a parser of its own."""

    def __init__(self, model: LoadedModel, offer: Offer | None) -> None:
        self.offer = offer
        self._model = model
        self._format = model.output_format
        self._tools = offer.callable if offer is not None else {}
        self._parallel = offer is None or offer.parallel
        self._short_ids = bool(self._tools) and parser_class(self._format.tool_parser or "").short_ids
        self._prompt_end = ""
        self._continued: str | None = None

    @property
    def keeps_calls(self) -> bool:
        """Whether calls have to be right: a call is wanted, or a function is strict."""
        return self.offer is not None and (self.offer.required or bool(self.offer.strict))

    @property
    def thinks_at_start(self) -> bool:
        """Whether the answer begins within thoughts that the prompt has opened; see `read_prompt`."""
        tags = TAGS.get(self._format.reasoning_parser or "")
        return tags is not None and begins_open(tags, self._prompt_end, self._continued)

    @property
    def kept_tokens(self) -> tuple[int, ...]:
        """Special tokens that the parsers have to see."""
        return tokens_to_keep(self._format, has_tools=bool(self._tools))

    def read_prompt(self, token_ids: Sequence[int], continued: str | None) -> None:
        """See where the prompt ends, and the text of the message that goes on, if one does."""
        end = list(token_ids[-PROMPT_END_TOKENS:])
        self._prompt_end = self._model.tokenizer.decode(end, skip_special_tokens=False)
        self._continued = continued

    @property
    def thinks(self) -> bool:
        """Whether the model's thoughts are told from its answers."""
        return self._format.reasoning_parser is not None

    def count_thoughts(self, thoughts: Iterable[str], completion_tokens: int) -> int | None:
        """Tokens of all answers' thoughts, without the tags around them; None of a model that has no thoughts."""
        return reasoning_tokens(self._model, thoughts, completion_tokens) if self.thinks else None

    def begin(self, generation_id: str, index: int) -> AnswerDeltas:
        """Reads the answer of this number."""
        parser = AnswerParser(self._format, self._tools, prompt_end=self._prompt_end, continued=self._continued)
        return AnswerDeltas(parser, f"{generation_id}/{index}", parallel=self._parallel, short_ids=self._short_ids)

    def chunks(self, generation_id: str) -> AnswerChunks:
        """Reads all answers as they come."""
        return AnswerChunks(self, generation_id)

    def message(self, generation_id: str, completion: Completion) -> tuple[dict[str, Any], str | None]:
        """A whole answer's message, and why it ended."""
        deltas = self.begin(generation_id, completion.index)
        text = reasoning = ""
        calls: list[dict[str, Any]] = []
        for delta in (*deltas.feed(completion.text), *deltas.finish()):
            text += delta.get("content", "")
            reasoning += delta.get("reasoning_content", "")
            for piece in delta.get("tool_calls", ()):
                if "id" in piece:
                    calls.append({key: piece[key] for key in ("id", "type", "function")})
                else:
                    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message, deltas.finish_reason(completion.finish_reason)


class AnswerDeltas:
    """Turns the text of one answer into deltas of its message. The first delta of a call has its id and name, those
    that follow its arguments in pieces."""

    def __init__(self, parser: AnswerParser, source: str, *, parallel: bool, short_ids: bool) -> None:
        """Ids of calls are made from `source`, so that an answer always has the same."""
        self._parser = parser
        self._source = source
        self._parallel = parallel
        self._short_ids = short_ids
        self._num_calls = 0

    def feed(self, text: str) -> Iterator[dict[str, Any]]:
        """Deltas for what has become certain with this piece of text."""
        return self._deltas(self._parser.feed(text)) if text else iter(())

    def finish(self) -> Iterator[dict[str, Any]]:
        """The rest, once no more text comes."""
        return self._deltas(self._parser.finish())

    def finish_reason(self, reason: FinishReason | None) -> str | None:
        """Why the message ended: for its calls, unless it was cut off."""
        return "tool_calls" if self._num_calls and reason == "stop" else reason

    def _deltas(self, events: list[Event]) -> Iterator[dict[str, Any]]:
        for event in merged(events):
            if isinstance(event, CallStart):
                self._num_calls += 1
            if isinstance(event, (CallStart, Arguments)):
                if self._num_calls == 1 or self._parallel:
                    yield {"tool_calls": [self._call_piece(event)]}
            elif isinstance(event, Reasoning):
                yield {"reasoning_content": event.text}
            else:
                yield {"content": event.text}

    def _call_piece(self, event: CallStart | Arguments) -> dict[str, Any]:
        index = self._num_calls - 1
        if isinstance(event, Arguments):
            return {"index": index, "function": {"arguments": event.text}}
        digest = hashlib.sha256(f"{self._source}/{index}".encode()).hexdigest()
        call_id = digest[:9] if self._short_ids else f"call_{digest[:24]}"
        return {"index": index, "id": call_id, "type": "function", "function": {"name": event.name, "arguments": ""}}


class AnswerChunks:
    """The choices of a stream's chunks, of all answers to a request."""

    def __init__(self, reader: AnswerReader, generation_id: str) -> None:
        self._reader = reader
        self._generation_id = generation_id
        self._answers: dict[int, AnswerDeltas] = {}
        self._thoughts: dict[int, list[str]] = {}

    def count_thoughts(self, completion_tokens: int) -> int | None:
        """As the reader's, of what has been read."""
        return self._reader.count_thoughts(map("".join, self._thoughts.values()), completion_tokens)

    def choices(self, gained: SequenceDelta, logprobs: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """What an answer gained, with log-probabilities beside the first of it, and how it ended if it did."""
        index = gained.index
        if index not in self._answers:
            self._answers[index] = self._reader.begin(self._generation_id, index)
        answer = self._answers[index]
        for delta in answer.feed(gained.text):
            self._note(index, delta)
            yield choice(index, {"delta": delta}, logprobs)
            logprobs = None
        if logprobs is not None:
            yield choice(index, {"delta": {}}, logprobs)
        if gained.finish_reason is not None:
            for delta in answer.finish():
                self._note(index, delta)
                yield choice(index, {"delta": delta})
            reason = answer.finish_reason(gained.finish_reason)
            yield choice(index, {"delta": {}}, None, reason, gained.stop_reason)

    def _note(self, index: int, delta: dict[str, Any]) -> None:
        if "reasoning_content" in delta:
            self._thoughts.setdefault(index, []).append(delta["reasoning_content"])
