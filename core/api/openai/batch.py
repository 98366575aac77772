"""`POST /v1/batch/completions`: many prompts with the same parameters, answered together."""

from __future__ import annotations

from contextlib import closing

from flask import Blueprint, Response

from core.api.body import json_response, read_request, reads
from core.api.context import api_context, served_model
from core.api.generation import Usage, envelope
from core.api.openai.completions import CompletionJob, check_prompts
from core.api.openai.schemas import BatchRequest
from core.errors import VRAMancerError
from core.security.access import policy

blueprint = Blueprint("openai_batch", __name__)


@blueprint.post("/v1/batch/completions")
@policy("user", waits=True)
@reads(BatchRequest)
def create_batch() -> Response:
    """A list of text completions in the order of the prompts, each with its prompt's `index`.

    A prompt that is wrong refuses the whole batch. One that fails later has an `error` in its place and leaves the
    others alone; when all of them fail, the answer is the first one's error.
    """
    fields = read_request(BatchRequest)
    model = served_model(fields.model)
    check_prompts(fields.prompts, limit=api_context().pipeline.settings.api.max_batch_prompts, param="prompts")
    job = CompletionJob.prepare(fields, fields.prompts, model, param="prompts")
    generation = job.start(prefix="batch", param="prompts")
    with closing(generation):
        results = generation.gather_each()
    total = Usage()
    data = []
    for index, result in enumerate(results):
        head = {"index": index, **envelope(f"{generation.id}-{index}", "text_completion", model, fields.model)}
        if isinstance(result, VRAMancerError):
            data.append({**head, "choices": [], **result.to_openai()})
            continue
        usage = Usage()
        for counter in (usage, total):
            job.count(counter, result)
        data.append({**head, "choices": job.choices(index, result, first=0), "usage": usage.to_openai()})
    errors = [result for result in results if isinstance(result, VRAMancerError)]
    if len(errors) == len(results):
        raise errors[0]
    return json_response({"id": generation.id, "object": "list", "data": data, "usage": total.to_openai()})
