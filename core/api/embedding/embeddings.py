"""`POST /v1/embeddings`, as OpenAI's, with vLLM's `truncate_prompt_tokens` and sentence-transformers' `prompt_name`."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from flask import Blueprint, Response
from pydantic import BeforeValidator, Field

from core.api.body import Integer, ModelName, RequestModel, json_response, read_request, reads, whole
from core.api.context import others_answer
from core.api.embedding.sources import Source, embedding_source
from core.api.upstreams import answered
from core.errors import InvalidRequestError
from core.security.access import policy

if TYPE_CHECKING:
    from core.embedding.encoder import Numbers
    from core.embedding.engine import EncoderInput

MAX_INPUTS = 2048  # OpenAI's
MAX_JSON_VALUES = 1 << 22  # some 80 MB of text
MAX_BASE64_VALUES = 1 << 26  # 256 MiB
MAX_PROMPT_NAME = 256

blueprint = Blueprint("embeddings", __name__)


def _as_inputs(value: Any) -> Any:
    """One text, token ids, or a list of either. Raises ValueError that says which of them is wrong."""
    several = value if isinstance(value, list) and not (value and isinstance(value[0], (int, float))) else [value]
    if not several:
        raise ValueError("must not be empty")
    if len(several) > MAX_INPUTS:
        raise ValueError(f"has {len(several)} inputs, more than the {MAX_INPUTS} that are taken at once")
    texts = isinstance(several[0], str)
    inputs = [whole(each) for each in several]
    for index, each in enumerate(inputs):
        fits = isinstance(each, str) if texts else _are_tokens(each)
        if not fits:
            raise ValueError(f"must be a text, token ids, or a list of texts or of token ids; number {index} is not")
        if not each:
            raise ValueError(f"must not be empty; number {index} is")
    return inputs


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


Words = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[int], Field(min_length=1)]
Several = Field(min_length=1, max_length=MAX_INPUTS)
Inputs = Annotated[
    list[str] | list[list[int]],
    BeforeValidator(
        _as_inputs,
        json_schema_input_type=Words | Tokens | Annotated[list[Words], Several] | Annotated[list[Tokens], Several],
    ),
]


class EmbeddingRequest(RequestModel):
    """`/v1/embeddings`. `truncate_prompt_tokens`: so many tokens of each input count, -1 as many as the model takes.
    `prompt_name`: one of the model's prompts is put in front of texts."""

    unsupported = {"embed_dtype": ("float32",), "endianness": ("native", "little"), "messages": ()}

    model: ModelName | None = None
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Integer | None = Field(None, ge=1)
    truncate_prompt_tokens: Integer | None = Field(None, ge=-1)
    prompt_name: str | None = Field(None, max_length=MAX_PROMPT_NAME)
    user: str | None = None


@blueprint.post("/v1/embeddings")
@policy("user", waits=True)
@reads(EmbeddingRequest)
def embeddings() -> Response:
    """A vector for each input."""
    return answered("embeddings", _embed_here) if others_answer() else _embed_here()


def _embed_here() -> Response:
    fields = read_request(EmbeddingRequest)
    source = embedding_source(fields.model)
    prompt, most = prompt_of(source, fields.prompt_name), kept_tokens(source, fields.truncate_prompt_tokens)
    inputs = [source.read(each, prompt=prompt, most=most, param="input") for each in fields.input]
    as_json = fields.encoding_format != "base64"
    vectors = vectors_of(source, inputs, fields.dimensions, as_json=as_json)
    used = sum(len(each.token_ids) for each in inputs)
    data = [
        {"object": "embedding", "index": index, "embedding": row.tolist() if as_json else _base64(row)}
        for index, row in enumerate(vectors)
    ]
    name = fields.model or source.model.name
    usage = {"prompt_tokens": used, "total_tokens": used}
    return json_response({"object": "list", "data": data, "model": name, "usage": usage})


def vectors_of(source: Source, inputs: list[EncoderInput], dimensions: int | None, *, as_json: bool) -> Numbers:
    """A row for each input. Raises `InvalidRequestError` for more dimensions than there are, and more numbers than are
    sent at once, and what computing them raises."""
    size = source.dimensions
    if dimensions is not None and dimensions > size:
        raise InvalidRequestError(f"dimensions: {source.model.name} has {size} dimensions.", param="dimensions")
    wanted, limit = len(inputs) * (dimensions or size), MAX_JSON_VALUES if as_json else MAX_BASE64_VALUES
    if wanted > limit:
        raise InvalidRequestError(
            f"The answer would have {wanted} numbers, more than the {limit} that are sent at once: send fewer inputs"
            f"{', or ask for base64' if as_json else ''}.",
            param="input",
        )
    return shortened(source.compute(inputs), dimensions)


def prompt_of(source: Source, name: str | None) -> str:
    """The text of a named prompt, or of the model's default one. Raises `InvalidRequestError`."""
    try:
        return source.layout.prompt(name)
    except KeyError:
        known = ", ".join(source.layout.prompts) or "none"
        raise InvalidRequestError(
            f"prompt_name: {source.model.name} has no such prompt; it has: {known}.", param="prompt_name"
        ) from None


def kept_tokens(source: Source, asked: int | None) -> int | None:
    """How many tokens of a text count; None: all, and too many are refused. Raises `InvalidRequestError`."""
    most = source.model.max_model_len
    if asked is None or asked == -1:
        return None if asked is None else most
    if not 1 <= asked <= most:
        raise InvalidRequestError(
            f"truncate_prompt_tokens must be -1, or lie between 1 and {most}.", param="truncate_prompt_tokens"
        )
    return asked


def shortened(vectors: Numbers, dimensions: int | None) -> Numbers:
    """The first numbers of each vector, brought to the length 1 again."""
    if dimensions is None:
        return vectors
    cut = vectors[:, :dimensions]
    return unit(cut)


def unit(vectors: Numbers) -> Numbers:
    """Vectors of length 1; what is 0 stays 0."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Numbers = vectors / np.maximum(lengths, np.float32(1e-12))
    return scaled


def _base64(row: Numbers) -> str:
    """Little-endian float32."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
