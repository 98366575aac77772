"""Time to the first token, time between tokens, and what requests are like."""

from __future__ import annotations

from monitoring.grafana.board.panels import QUANTILE_COLORS, Section, lines
from monitoring.grafana.board.queries import Query, mean, quantile, quantiles, rate

_PHASES = ("queue", "prefill", "decode")
_SIZES = {"prompt": "request_prompt_tokens", "answer": "request_generation_tokens"}

SECTION = Section(
    "First token and tokens",
    (
        lines(
            "Time to first token",
            "From submission to the first token: waiting, then computing the prompt.",
            *quantiles("time_to_first_token_seconds"),
            unit="s",
            colors=QUANTILE_COLORS,
        ),
        lines(
            "Time between tokens",
            "Between two outputs of one request. It grows with the batch, and with prompts that are computed between.",
            *quantiles("inter_token_latency_seconds"),
            unit="s",
            colors=QUANTILE_COLORS,
        ),
        lines(
            "Where a request's time goes",
            "Mean seconds that a request waits, has its prompt computed, and is decoded.",
            *(Query(mean(f"request_{phase}_seconds"), f"{phase} {{{{instance}}}}") for phase in _PHASES),
            unit="s",
            stacked=True,
            colors={"^queue": "orange", "^prefill": "purple", "^decode": "blue"},
        ),
        lines(
            "How requests end",
            "By reason: a stop string or the model's own end (stop), the limit of tokens (length), given up by the "
            "client (abort), an error of the server (error).",
            Query(rate("requests_finished_total", "reason"), "{{reason}} {{instance}}"),
            unit="reqps",
            stacked=True,
            colors={"^stop": "green", "^length": "blue", "^abort": "orange", "^error": "red"},
        ),
        lines(
            "Length of prompts and answers",
            "Tokens of a request: half of them have fewer than p50, 19 in 20 fewer than p95.",
            *(
                Query(quantile(percent / 100, name), f"{what} p{percent} {{{{instance}}}}")
                for what, name in _SIZES.items()
                for percent in (50, 95)
            ),
            unit="suffix: tok",
            colors={"^prompt": "purple", "^answer": "blue"},
        ),
        lines(
            "Prompt tokens found in the cache",
            "Share of prompt tokens whose KV was there already, so that they were not computed again.",
            Query(f"{rate('prefix_cache_hits_total')} / ({rate('prefix_cache_queries_total')} > 0)", "{{instance}}"),
            unit="percentunit",
            top=1,
        ),
    ),
)
