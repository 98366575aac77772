"""Which routes are public, and which change something. What is not written here needs a token and is a change.

Public (no token): liveness and readiness for orchestrators, and `/health`, which then names checks without details.
`/metrics` needs the token here; Prometheus scrapes the separate metrics listener, which has none and should stay on
the loopback interface or a private network.

Read-only mode (`VRM_READ_ONLY`) refuses what alters shared state: loading and unloading models, and cancelling
requests. Generating is allowed, and so is everything that only reads.
"""

from __future__ import annotations

from core.errors import PermissionDeniedError

PUBLIC_RULES = frozenset({"/live", "/ready", "/health"})

READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

INFERENCE_RULES = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/batch/completions",
        "/api/generate",
        "/api/infer",
        "/tokenize",
        "/detokenize",
    }
)


def is_public(rule: str | None, method: str) -> bool:
    """Whether the URL rule answers without a token. A CORS preflight cannot carry one, so OPTIONS is public."""
    return method == "OPTIONS" or rule in PUBLIC_RULES


def is_mutation(rule: str | None, method: str) -> bool:
    """Whether the route changes shared state; a route that is written nowhere is taken to."""
    return method not in READING_METHODS and rule not in INFERENCE_RULES


def check_read_only(rule: str | None, method: str, *, read_only: bool) -> None:
    """Raise `PermissionDeniedError` for a mutation in read-only mode."""
    if read_only and is_mutation(rule, method):
        raise PermissionDeniedError("The server is in read-only mode; this request would change its state.")
