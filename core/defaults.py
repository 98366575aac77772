"""Names and values that hold where nothing else is said. Settings have theirs in `core/config_schema.py` and
`core/config_service.py`, sampling parameters in `core.request.SamplingParams`."""

from __future__ import annotations

DEMO_NAME = "vramancer-demo"
"""The bundled model, which is served where none is named."""

DEMO_EMBEDDING_NAME = "vramancer-demo-embedding"
"""The bundled embedding model, which is served beside the demo model where none is named."""

NO_MODEL = "none"
"""What a setting names in place of a model to have none."""

DEFAULT_OWNER = "admin"
"""Whose requests they are; whoever has the API token is it too."""

COMPLETION_MAX_TOKENS = 16
"""Of a text completion; OpenAI's."""

GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Sampling parameters whose default a model's `generation_config.json` may set."""
MIN_CLUSTER_TOKEN_LENGTH = 16
"""Whoever records a handshake may try tokens at home."""
