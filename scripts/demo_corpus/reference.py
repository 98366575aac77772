"""Environment variables and endpoints of VRAMancer, as tables, and the facts that follow from them."""

from __future__ import annotations

from .facts import Fact
from .facts import fact as _fact

VARIABLES: dict[str, tuple[str, str]] = {
    "VRM_API_HOST": ("sets the address where the API listens", "127.0.0.1"),
    "VRM_API_PORT": ("sets the port of the API", "5000"),
    "VRM_METRICS_PORT": ("sets the port of the metrics", "9108"),
    "VRM_PRODUCTION": ("turns on strict mode, which refuses to start on a weak setting", "false"),
    "VRM_READ_ONLY": ("makes the server refuse every change", "false"),
    "VRM_MINIMAL_TEST": ("turns on a test mode with the demo model on two CPU devices", "false"),
    "VRM_TEST_MODE": ("turns on test conveniences such as fixed seeds", "false"),
    "VRM_LOG_JSON": ("writes one JSON object per log line", "false"),
    "VRM_LEND_RATIO": ("sets the largest share of its memory that a GPU lends", "0.7"),
    "VRM_RECLAIM_THRESHOLD": ("sets the share of its memory at which a lender takes back what it lent", "0.8"),
    "VRM_DISABLE_RATE_LIMIT": ("turns off rate limiting", "false"),
}
"""By name: what a variable does, and its default as `config.yaml` has it."""

ENDPOINTS: dict[str, str] = {
    "/v1/completions": "completes a text and can stream the answer",
    "/v1/chat/completions": "answers a chat and can stream the answer",
    "/v1/batch/completions": "takes many prompts in one request",
    "/v1/score": "scores pairs of texts",
    "/v1/models": "lists the model in the OpenAI format",
    "/api/models": "lists the models that could be loaded",
    "/api/models/unload": "frees the memory of the model",
    "/api/generate": "generates text with VRAMancer's own parameters",
    "/api/infer": "takes token ids and returns logits or hidden states",
    "/tokenize": "turns text into token ids",
    "/health": "reports the health of the server",
    "/ready": "says whether the server can really produce tokens",
    "/live": "says whether the server is alive",
    "/api/pipeline/status": "shows the pipeline, the placement and the state of each part",
    "/api/memory": "shows the memory of every device, what is lent, and the tiers",
    "/api/gpu": "shows the memory and utilisation of each GPU",
    "/api/system": "shows CPU, main memory and disk",
    "/api/queue/status": "shows the queue and the oldest requests",
    "/api/batcher/stats": "shows the throughput of the batcher",
}
"""By path: what the endpoint does."""

_ENDPOINT_TASKS: dict[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("send a chat request", "send messages"),
    "/v1/completions": ("complete a text",),
    "/v1/batch/completions": ("send many prompts", "send a batch of prompts"),
    "/v1/models": ("list the models", "see the name of the model"),
    "/health": ("check the health", "do a health check"),
    "/api/memory": ("see who lends what", "see what is lent"),
    "/api/queue/status": ("see the queue",),
    "/tokenize": ("count the tokens of a text", "tokenize a text"),
    "/api/models/unload": ("unload the model", "free the memory of the model"),
}


def _reference_facts() -> list[Fact]:
    """Facts made from the tables."""
    facts = []
    for name, (meaning, default) in VARIABLES.items():
        facts.append(
            _fact(
                f"{name} {meaning}. It is {default} by default.",
                f"What does {name} do?",
                f"What is {name} for?",
                f"What is the default of {name}?",
                f"Explain {name}.",
                topics=(name,),
            )
        )
    for path, meaning in ENDPOINTS.items():
        facts.append(
            _fact(
                f"{path} {meaning}.",
                f"What does {path} do?",
                f"What is {path} for?",
                f"What does the endpoint {path} do?",
                topics=(path,),
            )
        )
    for path, tasks in _ENDPOINT_TASKS.items():
        facts.append(Fact(f"Use {path}. It {ENDPOINTS[path]}.", (), (), tasks))
    return facts


REFERENCE: list[Fact] = _reference_facts()
