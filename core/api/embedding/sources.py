"""What gives vectors, or scores of pairs: an encoder beside the chat model, or the chat model's own hidden states."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from flask import g, request

from core.api.context import api_context, current_span, served_model
from core.api.errors import ClientDisconnectedError
from core.api.generation import POLL_INTERVAL_S, start_inferences
from core.batching.sequence import RawAnswer
from core.embedding.engine import EncoderEngine, EncoderInput
from core.embedding.layout import Layout, read_layout
from core.embedding.pooling import pool
from core.errors import ConflictError, ContextLengthError, InvalidRequestError, StepFailedError
from core.security.admission import DISCONNECTED_KEY

if TYPE_CHECKING:
    from core.embedding.encoder import Numbers
    from core.embedding.loading import EncoderInfo
    from core.engine.submission import LoadedModel

GROUP = 16
"""Prompts that the chat model has of one request at a time."""
GROUP_BYTES = 256 * 1024 * 1024
"""Of hidden states that it gives for them, where those of all tokens are pooled."""
FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Source:
    """A model that texts are read for. `engine` is the encoder's; None: it is the chat model."""

    model: EncoderInfo | LoadedModel
    layout: Layout
    engine: EncoderEngine | None = None

    @property
    def scores_pairs(self) -> bool:
        """A reranker, which has no vectors."""
        return self.engine is not None and self.engine.info.kind == "reranker"

    @property
    def dimensions(self) -> int:
        """Of its vectors."""
        if self.engine is not None:
            return self.engine.info.dimensions
        hidden: int = api_context().pipeline.engine.plan.architecture.hidden_size
        return hidden * len(self.layout.poolings)

    def read(self, text: str | Sequence[int], *, prompt: str, most: int | None, param: str) -> EncoderInput:
        """A text behind its prompt, or token ids as they are. `most` tokens of it are kept; None: too many are refused.

        Raises `InvalidRequestError` and `ContextLengthError`.
        """
        limit = self.model.max_model_len
        skip = 0
        if isinstance(text, str):
            whole = _lower(prompt + text, self.layout)
            tokens = self._encode(whole, limit if most is None else None, param)
            if most is not None and len(tokens) > most:
                bare = self.model.tokenizer.encode(whole, add_special_tokens=False)
                tokens = _cut(tokens, bare, most)
            if prompt and not self.layout.include_prompt:
                skip = self._prompt_tokens(_lower(prompt, self.layout))
        else:
            tokens = list(text)[:most]
            if not all(0 <= token < self.model.vocab_size for token in tokens):
                raise InvalidRequestError(
                    f"{param}: token ids lie between 0 and {self.model.vocab_size - 1}.", param=param
                )
        return EncoderInput(self._checked(tokens, param), skip=min(skip, len(tokens) - 1))

    def read_pair(self, query: str, text: str, *, most: int | None, param: str) -> EncoderInput:
        """A query and a text for a reranker; of too many tokens the text's last ones are left out, or refused."""
        limit = self.model.max_model_len
        tokenizer = self.model.tokenizer
        try:
            tokens, types = tokenizer.encode_pair(
                _lower(query, self.layout), _lower(text, self.layout), context=limit if most is None else None
            )
        except InvalidRequestError as error:
            error.param = param
            raise
        if most is not None and len(tokens) > most:
            bare = tokenizer.encode(_lower(text, self.layout), add_special_tokens=False)
            over = len(tokens) - most
            end = _end_of(tokens, bare)
            if over > len(bare):
                raise ContextLengthError(f"{param}: the query alone has more than {most} tokens.", param=param)
            tokens, types = tokens[: end - over] + tokens[end:], types[: end - over] + types[end:]
        return EncoderInput(self._checked(tokens, param), types)

    def compute(self, inputs: Sequence[EncoderInput]) -> Numbers:
        """Vectors `[inputs, dimensions]`, or scores `[inputs, 1]`. Raises what the engine refuses or fails with."""
        if self.engine is not None:
            values = _from_encoder(self.engine, inputs)
        else:
            values = np.concatenate([_from_chat_model(self, group) for group in self._groups(inputs)])
        if not np.isfinite(values).all():
            raise StepFailedError(f"{self.model.name} computed numbers that are not finite for one of the inputs.")
        return values

    def _encode(self, text: str, context: int | None, param: str) -> list[int]:
        try:
            return self.model.tokenizer.encode(text, context=context)
        except InvalidRequestError as error:
            error.param = param
            raise

    def _prompt_tokens(self, prompt: str) -> int:
        """Tokens that are the prompt's, counted as sentence-transformers does: without one that ends every text."""
        tokens = self.model.tokenizer.encode(prompt)
        return len(tokens) - (tokens[-1] in self.model.tokenizer.special_tokens)

    def _checked(self, tokens: list[int], param: str) -> list[int]:
        if not tokens:
            raise InvalidRequestError(f"{param} has no tokens.", param=param)
        if len(tokens) > self.model.max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {self.model.max_model_len} tokens, but {param} has "
                f"{len(tokens)}; truncate_prompt_tokens cuts texts.",
                param=param,
            )
        return tokens

    def _groups(self, inputs: Sequence[EncoderInput]) -> Iterator[Sequence[EncoderInput]]:
        """What the chat model computes at a time: what fits into its queue, and bounded hidden states."""
        engine = api_context().pipeline.engine
        capacity = engine.batcher.intake.capacity
        row_bytes = engine.plan.architecture.hidden_size * FLOAT32_BYTES
        most, max_rows = min(GROUP, capacity.sequences), GROUP_BYTES // row_bytes
        if self.layout.poolings == ("lasttoken",):
            max_rows = capacity.tokens
        group: list[EncoderInput] = []
        tokens = 0
        for each in inputs:
            length = len(each.token_ids)
            if group and (len(group) == most or tokens + length > min(max_rows, capacity.tokens)):
                yield group
                group, tokens = [], 0
            group.append(each)
            tokens += length
        yield group


def embedding_source(name: str | None) -> Source:
    """What gives the vectors that are asked for; without a name the embedding model, or else the chat model.

    Raises `ModelNotLoadedError`, `ModelNotFoundError`, and `InvalidRequestError` for a reranker.
    """
    encoders = api_context().pipeline.encoders
    if name is not None and encoders.reranker is not None and encoders.reranker.info.knows(name):
        raise InvalidRequestError(f"{name} is a reranker, which has no embeddings; /v1/rerank uses it.", param="model")
    engine = encoders.embedding
    if engine is not None and (name is None or engine.info.knows(name)):
        return _encoder(engine)
    model = served_model(name)
    return Source(model, _chat_layout(model.path))


def scoring_source(name: str | None) -> Source:
    """What compares two texts; without a name the reranker, or else what gives vectors. Raises as above."""
    reranker = api_context().pipeline.encoders.reranker
    if reranker is not None and (name is None or reranker.info.knows(name)):
        return _encoder(reranker)
    return embedding_source(name)


def _encoder(engine: EncoderEngine) -> Source:
    span = current_span()
    if span is not None:
        span.set(gen_ai__request__model=engine.info.name)
    return Source(engine.info, engine.info.layout, engine)


@lru_cache(maxsize=16)
def _chat_layout(path: Path) -> Layout:
    """How the chat model's hidden states are pooled: as its files say, else the last token's, at length 1."""
    return read_layout(path, otherwise="lasttoken")


def _lower(text: str, layout: Layout) -> str:
    return text.lower() if layout.lower_case else text


def _cut(tokens: list[int], bare: list[int], most: int) -> list[int]:
    """`most` tokens: those around the text's own (`bare`) stay, of these the last are left out."""
    end, over = _end_of(tokens, bare), len(tokens) - most
    return tokens[: max(0, end - over)] + tokens[end:] if over < len(bare) else tokens[:most]


def _end_of(tokens: list[int], bare: list[int]) -> int:
    """Where the last text's own tokens end; behind them stand those that the tokenizer puts there."""
    ends = range(len(tokens), len(bare) - 1, -1)
    return next((end for end in ends if tokens[end - len(bare) : end] == bare), len(tokens))


def _from_encoder(engine: EncoderEngine, inputs: Sequence[EncoderInput]) -> Numbers:
    context, request_id = api_context(), g.request_id
    name = f"embd-{uuid.uuid4().hex}"
    client_gone: Callable[[], bool] = request.environ.get(DISCONNECTED_KEY, lambda: False)
    running = engine.submit(inputs, request_id=name, owner=g.principal.owner)
    context.live.add(request_id, name)
    try:
        while not running.wait(POLL_INTERVAL_S):
            if client_gone():
                raise ClientDisconnectedError
        return running.result()
    finally:
        running.abort()  # nothing, once it is done
        context.live.discard(request_id, name)


def _from_chat_model(source: Source, inputs: Sequence[EncoderInput]) -> Numbers:
    """Hidden states from the engine, in the steps of everybody's requests; pooled here."""
    model = served_model(source.model.name)
    last = source.layout.poolings == ("lasttoken",)
    raws = [RawAnswer("hidden_states", "last" if last else "all") for _ in inputs]
    asked = [(each.token_ids, raw) for each, raw in zip(inputs, raws, strict=True)]
    with closing(start_inferences(asked, model)) as running:
        results = running.gather()
    if any(result.completions[0].finish_reason != "stop" for result in results):
        raise ConflictError("The request was cancelled.")
    rows = [
        pool(torch.from_numpy(raw.values())[None], [1 if last else len(each.token_ids)], [each.skip], source.layout)
        for raw, each in zip(raws, inputs, strict=True)
    ]
    values: Numbers = torch.cat(rows).numpy()
    return values
