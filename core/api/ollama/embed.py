"""`POST /api/embed`: vectors as Ollama gives them, each of length 1."""

from __future__ import annotations

import time

from flask import Blueprint, Response

from core.api.body import json_response, read_request, reads
from core.api.embedding.embeddings import kept_tokens, prompt_of, unit, vectors_of
from core.api.embedding.sources import embedding_source
from core.api.ollama.conversation import plain_name
from core.api.ollama.schemas import EmbedRequest
from core.security.access import policy

blueprint = Blueprint("ollama_embed", __name__)


@blueprint.post("/api/embed")
@policy("user", waits=True)
@reads(EmbedRequest)
def embed() -> Response:
    """A vector for each text. `prompt_eval_count` counts all their tokens."""
    began_ns = time.perf_counter_ns()
    fields = read_request(EmbedRequest, untyped=True)
    source = embedding_source(plain_name(fields.model))
    prompt, most = prompt_of(source, None), kept_tokens(source, None if fields.truncate is False else -1)
    inputs = [source.read(each, prompt=prompt, most=most, param="input") for each in fields.input]
    vectors = unit(vectors_of(source, inputs, fields.dimensions, as_json=True)).tolist() if inputs else []
    return json_response(
        {
            "model": fields.model,
            "embeddings": vectors,
            "total_duration": time.perf_counter_ns() - began_ns,
            "load_duration": 0,
            "prompt_eval_count": sum(len(each.token_ids) for each in inputs),
        }
    )
