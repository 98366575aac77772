"""Questions and answers about the engine, the environment variables and the endpoints of VRAMancer."""

from __future__ import annotations

from .facts import Fact
from .facts import fact as _fact

ENGINE: list[Fact] = [
    _fact(
        "VRAM lending lets a GPU that runs out of cache space borrow idle VRAM from a neighbour "
        "and give it back later.",
        "What is VRAM lending?",
        "Explain VRAM lending.",
        "How does VRAM lending work?",
        "What is lending?",
        "What does VRAM lending mean?",
        "Tell me about VRAM lending.",
        "Why does VRAMancer lend memory?",
        "Can a GPU borrow memory?",
        "Define VRAM lending.",
    ),
    _fact(
        "A GPU lends at most 70 percent of its VRAM. VRM_LEND_RATIO sets this limit.",
        "How much VRAM can a GPU lend?",
        "What is the lending limit?",
        "What is the lend ratio?",
        "How much memory may be lent?",
    ),
    _fact(
        "A lender takes its VRAM back at 80 percent utilisation. VRM_RECLAIM_THRESHOLD sets this.",
        "When does a lender reclaim memory?",
        "What is the reclaim threshold?",
        "When is lent VRAM taken back?",
        "When does a GPU reclaim its memory?",
    ),
    _fact(
        "Lenders are scored by free capacity with 40 percent, link speed with 30 percent "
        "and idle time with 30 percent.",
        "How is a lender chosen?",
        "How are lenders scored?",
        "Which GPU lends its memory?",
    ),
    _fact(
        "There are six memory tiers: own VRAM, VRAM of other GPUs, host RAM, RAM of other nodes, local NVMe, and "
        "network or object storage.",
        "What are the memory tiers?",
        "How many memory tiers are there?",
        "List the memory tiers.",
        "Explain the memory tiers.",
        "What are the six tiers?",
        "What is the memory hierarchy?",
        "What tiers are there?",
    ),
    _fact("L1 is the GPU's own VRAM.", "What is L1?", "What is tier L1?", "Explain L1."),
    _fact("L2 is the VRAM of other GPUs.", "What is L2?", "What is tier L2?", "Explain L2."),
    _fact("L3 is pinned host RAM.", "What is L3?", "What is tier L3?", "Explain L3."),
    _fact("L4 is the RAM of other nodes.", "What is L4?", "What is tier L4?", "Explain L4."),
    _fact("L5 is local NVMe storage.", "What is L5?", "What is tier L5?", "Explain L5."),
    _fact("L6 is network or object storage.", "What is L6?", "What is tier L6?", "Explain L6."),
    _fact(
        "VRAMancer places layers by free VRAM or by measured speed. The strategies are profiled, vram and balanced.",
        "How are layers placed?",
        "What is placement?",
        "How does VRAMancer split a model?",
        "What placement strategies are there?",
        "How does the model splitter work?",
        "How are layers split across GPUs?",
        "Which strategies can split a model?",
        "How does placement work?",
    ),
    _fact(
        "Yes. A 24 GB card and a 16 GB card behave as one pool of 40 GB.",
        "Can I combine two GPUs?",
        "Can I use GPUs of different sizes?",
        "Can I mix different GPUs?",
        "Do my GPUs have to match?",
        "Can I combine a 24 GB and a 16 GB card?",
        "Can I use two different cards?",
    ),
    _fact(
        "A paged KV cache keeps keys and values in fixed-size pages, so memory is shared and nothing is wasted.",
        "What is a paged KV cache?",
        "What is the KV cache?",
        "Explain the paged KV cache.",
        "What is paged attention?",
    ),
    _fact(
        "Continuous batching lets requests join and leave the batch at every step.",
        "What is continuous batching?",
        "How does batching work?",
        "Explain continuous batching.",
        "How does VRAMancer serve many requests?",
    ),
    _fact(
        "Pipeline parallelism puts different layers on different GPUs and keeps all of them busy at the same time.",
        "What is pipeline parallelism?",
        "Explain pipeline parallelism.",
        "How do several GPUs work together?",
    ),
    _fact(
        "Prefix caching reuses the cache of a prompt start that was seen before.",
        "What is prefix caching?",
        "Explain prefix caching.",
        "How are repeated prompts made faster?",
    ),
    _fact(
        "VTP is the transport that carries tensors between nodes.",
        "What is VTP?",
        "Explain VTP.",
        "How do tensors travel between nodes?",
        "What does VTP do?",
    ),
    _fact(
        "Workers and masters find each other with mDNS and UDP broadcast.",
        "How does discovery work?",
        "How do nodes find each other?",
        "What is discovery?",
        "How is a node found?",
    ),
    _fact(
        "Hot-plug means that a GPU can appear or vanish at run time, and the pipeline rebalances.",
        "What is hot-plug?",
        "What happens when a GPU vanishes?",
        "Can I add a GPU at run time?",
        "What if a GPU disappears?",
    ),
    _fact(
        "VRAMancer can quantize weights to INT8 or INT4 and compress blocks with zstd or lz4.",
        "Does VRAMancer support quantization?",
        "Can I quantize a model?",
        "What compression is there?",
        "How can I make a model smaller?",
        "Does VRAMancer compress data?",
    ),
    _fact(
        "Nothing is lost: the request is rebuilt on the remaining devices and goes on.",
        "What happens when a worker dies?",
        "What happens if a GPU fails?",
        "What if a node crashes?",
        "Is my request lost when a GPU fails?",
    ),
    _fact(
        "VRAM is the memory of a graphics card.",
        "What is VRAM?",
        "What does VRAM mean?",
        "Explain VRAM.",
        "Define VRAM.",
    ),
    _fact(
        "A GPU is a chip that does many calculations at the same time. Language models run fast on it.",
        "What is a GPU?",
        "What does a GPU do?",
        "Explain what a GPU is.",
        "Define GPU.",
    ),
    _fact(
        "A token is a small piece of text, such as a word or a part of a word.",
        "What is a token?",
        "Explain tokens.",
        "What are tokens?",
        "Define token.",
    ),
    _fact(
        "A language model is a program that predicts the next piece of a text.",
        "What is a language model?",
        "Explain language models.",
        "What is an LLM?",
        "Define LLM.",
    ),
]

VARIABLES: dict[str, tuple[str, str]] = {
    "VRM_API_TOKEN": ("sets the API token", "has no default"),
    "VRM_API_HOST": ("sets the address where the API listens", "is 127.0.0.1 by default"),
    "VRM_API_PORT": ("sets the port of the API", "is 5000 by default"),
    "VRM_PRODUCTION": ("turns on strict mode, which refuses to start on a weak setting", "is 0 by default"),
    "VRM_BACKEND_ALLOW_STUB": ("allows a stub to answer when no backend is available", "is 0 by default"),
    "VRM_MINIMAL_TEST": ("turns on a test mode that needs no GPU and no download", "is 0 by default"),
    "VRM_TEST_MODE": ("turns on test conveniences such as fixed seeds", "is 0 by default"),
    "VRM_LOG_JSON": ("turns on structured JSON logs", "is 0 by default"),
    "VRM_TRACING": ("turns on OpenTelemetry tracing", "is 0 by default"),
    "VRM_LEND_RATIO": ("sets the largest fraction of its VRAM that a GPU may lend", "is 0.70 by default"),
    "VRM_RECLAIM_THRESHOLD": ("sets the VRAM utilisation at which a lender reclaims", "is 0.80 by default"),
    "VRM_SQLITE_PATH": ("turns on SQLite persistence at this path", "is off by default"),
    "VRM_READ_ONLY": ("makes the server refuse every change", "is 0 by default"),
    "VRM_DISABLE_RATE_LIMIT": ("turns off rate limiting", "is 0 by default"),
    "VRM_CLUSTER_MASTER": ("names the master as host:port", "has no default"),
    "VRM_METRICS_PORT": ("sets the port of the metrics", "is 9108 by default"),
}

ENDPOINTS: dict[str, str] = {
    "/v1/completions": "completes a text and can stream the answer",
    "/v1/chat/completions": "answers a chat and can stream the answer",
    "/v1/batch/completions": "takes many prompts in one request",
    "/v1/models": "lists the models in the OpenAI format",
    "/api/models/load": "loads a model and splits it over the GPUs",
    "/api/models": "lists the available and the loaded models",
    "/api/generate": "generates text with VRAMancer's own parameters",
    "/api/infer": "takes token ids and returns logits or hidden states",
    "/health": "reports the health of GPU, memory and backend",
    "/ready": "says whether the server can really produce tokens",
    "/live": "says whether the server is alive",
    "/metrics": "serves the Prometheus metrics",
    "/api/pipeline/status": "shows the pipeline, the placement and the health of each part",
    "/api/gpu": "shows the memory and utilisation of each GPU",
    "/api/system": "shows CPU, RAM and disk",
    "/api/nodes": "shows the nodes of the cluster",
    "/api/queue/status": "shows the queue depth and the circuit breaker",
    "/api/batcher/stats": "shows the throughput and the queue of the batcher",
}

ENDPOINT_TASKS: dict[str, tuple[str, ...]] = {
    "/v1/chat/completions": (
        "How do I send a chat request?",
        "Which endpoint is for chat?",
        "Where is the chat endpoint?",
    ),
    "/v1/completions": ("How do I complete a text?", "Which endpoint completes text?"),
    "/v1/batch/completions": ("How do I send many prompts?", "Which endpoint takes many prompts?"),
    "/v1/models": ("How do I list the models?", "Which endpoint lists the models?", "Where is the list of models?"),
    "/health": ("How do I check the health?", "Which endpoint shows the health?", "Is there a health check?"),
    "/api/gpu": ("How do I see the GPU memory?", "Which endpoint shows the GPUs?"),
    "/api/nodes": ("How do I see the cluster nodes?", "Which endpoint shows the nodes?"),
    "/api/pipeline/status": ("Which endpoint shows the pipeline?", "How do I see the pipeline state?"),
    "/api/queue/status": ("How do I see the queue?", "Which endpoint shows the queue?"),
}


def _reference_facts() -> list[Fact]:
    """Facts made from the tables of environment variables and endpoints."""
    facts = []
    for name, (meaning, default) in VARIABLES.items():
        facts.append(
            _fact(
                f"{name} {meaning}. It {default}.",
                f"What does {name} do?",
                f"What is {name}?",
                f"What is {name} for?",
                f"Explain {name}.",
                f"What is the default of {name}?",
                f"Tell me about {name}.",
            )
        )
    for path, meaning in ENDPOINTS.items():
        facts.append(
            _fact(
                f"{path} {meaning}.",
                f"What does {path} do?",
                f"What is {path}?",
                f"What is {path} for?",
                f"Explain {path}.",
                f"What does the endpoint {path} do?",
            )
        )
    for path, questions in ENDPOINT_TASKS.items():
        facts.append(Fact(f"Use {path}. It {ENDPOINTS[path]}.", questions))
    return facts


REFERENCE: list[Fact] = _reference_facts()
