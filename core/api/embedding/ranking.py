"""`POST /v1/rerank` in Jina's and Cohere's shape, `POST /v1/score` in vLLM's.

A reranker scores pairs. Where none is served, the cosine of two embeddings is the score.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from flask import Blueprint, Response
from pydantic import BaseModel, BeforeValidator, Field

from core.api.body import Integer, ModelName, RequestModel, json_response, read_request, reads
from core.api.embedding.embeddings import MAX_INPUTS, Several, Words, kept_tokens, unit
from core.api.embedding.sources import Source, scoring_source
from core.errors import InvalidRequestError
from core.security.access import policy

if TYPE_CHECKING:
    from core.embedding.engine import EncoderInput

QUERY_PROMPTS = ("query",)
DOCUMENT_PROMPTS = ("document", "passage")
"""What is put in front of queries and documents, if the model has a prompt of such a name."""

blueprint = Blueprint("ranking", __name__)


def _text(value: Any, where: str) -> str:
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a text, or an object with text")  # noqa: TRY004 (pydantic's)
    if not text:
        raise ValueError(f"{where} must not be empty")
    return text


def _as_texts(value: Any) -> list[str]:
    """One text or a list of them, each plain or as `{"text"}`. Raises ValueError that says which is wrong."""
    several = value if isinstance(value, list) else [value]
    if not several:
        raise ValueError("must not be empty")
    if len(several) > MAX_INPUTS:
        raise ValueError(f"has {len(several)} texts, more than the {MAX_INPUTS} that are taken at once")
    return [_text(each, f"number {index}") for index, each in enumerate(several)]


class TextObject(BaseModel):
    """A text as Cohere and Jina also take it."""

    text: Words


Item = Words | TextObject
Texts = Annotated[
    list[str], BeforeValidator(_as_texts, json_schema_input_type=Item | Annotated[list[Item], Several])
]  # fmt: skip


class RerankRequest(RequestModel):
    """`/v1/rerank`. Without `top_n` all documents come back, the best first."""

    unsupported = {"max_tokens_per_doc": (), "max_chunks_per_doc": (), "rank_fields": ()}
    instead = {"max_tokens_per_doc": "truncate_prompt_tokens"}

    model: ModelName | None = None
    query: Annotated[str, BeforeValidator(lambda value: _text(value, "it"), json_schema_input_type=Item)]
    documents: Texts
    top_n: Integer | None = Field(None, ge=0)
    return_documents: bool | None = None
    truncate_prompt_tokens: Integer | None = Field(None, ge=-1)


class ScoreRequest(RequestModel):
    """`/v1/score`: one text with each of several, or as many of one as of the other, one by one."""

    unsupported = {"activation": (True,), "use_activation": (True,)}

    model: ModelName | None = None
    text_1: Texts
    text_2: Texts
    truncate_prompt_tokens: Integer | None = Field(None, ge=-1)


@blueprint.post("/v1/rerank")
@blueprint.post("/v2/rerank")
@blueprint.post("/v1/reranking")
@policy("user", waits=True)
@reads(RerankRequest)
def rerank() -> Response:
    """Documents by how well they answer a query."""
    fields = read_request(RerankRequest)
    source = scoring_source(fields.model)
    scores, used = _scores(source, [fields.query], fields.documents, fields.truncate_prompt_tokens, "documents")
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    if fields.top_n:
        order = order[: fields.top_n]
    shown = fields.return_documents is not False
    results = [
        {"index": index, "relevance_score": scores[index]}
        | ({"document": {"text": fields.documents[index]}} if shown else {})
        for index in order
    ]
    usage = {"prompt_tokens": used, "total_tokens": used}
    head = {"id": f"rerank-{uuid.uuid4().hex}", "object": "list", "model": fields.model or source.model.name}
    return json_response({**head, "usage": usage, "results": results})


@blueprint.post("/v1/score")
@policy("user", waits=True)
@reads(ScoreRequest)
def score() -> Response:
    """How alike two texts are, or how well one answers the other."""
    fields = read_request(ScoreRequest)
    first, second = fields.text_1, fields.text_2
    if len(first) not in (1, len(second)):
        raise InvalidRequestError(
            f"text_1 has {len(first)} texts and text_2 {len(second)}: text_1 must be one text, or as many as text_2.",
            param="text_1",
        )
    source = scoring_source(fields.model)
    scores, used = _scores(source, first, second, fields.truncate_prompt_tokens, "text_2")
    data = [{"index": index, "object": "score", "score": each} for index, each in enumerate(scores)]
    head = {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
    usage = {"prompt_tokens": used, "total_tokens": used, "completion_tokens": 0}
    return json_response({**head, "model": fields.model or source.model.name, "data": data, "usage": usage})


def _scores(
    source: Source, first: Sequence[str], second: Sequence[str], truncate: int | None, param: str
) -> tuple[list[float], int]:
    """One for each of `second`, against the text of `first` with its number, or the only one; and the tokens read."""
    most = kept_tokens(source, truncate)
    if source.scores_pairs:
        asked = first if len(first) > 1 else [first[0]] * len(second)
        pairs = [source.read_pair(*each, most=most, param=param) for each in zip(asked, second, strict=True)]
        return [float(row[0]) for row in source.compute(pairs)], _tokens(pairs)
    ahead, behind = _prompt(source, QUERY_PROMPTS), _prompt(source, DOCUMENT_PROMPTS)
    texts = [source.read(each, prompt=ahead, most=most, param="query") for each in first]
    texts += [source.read(each, prompt=behind, most=most, param=param) for each in second]
    vectors = unit(source.compute(texts))
    queries, documents = vectors[: len(first)], vectors[len(first) :]
    return [float(each) for each in (queries * documents).sum(axis=1)], _tokens(texts)


def _prompt(source: Source, names: Sequence[str]) -> str:
    prompts = source.layout.prompts
    return next((prompts[name] for name in names if name in prompts), source.layout.prompt(None))


def _tokens(inputs: Sequence[EncoderInput]) -> int:
    return sum(len(each.token_ids) for each in inputs)
