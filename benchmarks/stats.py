"""From traces to the numbers in the tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from benchmarks.peers.base import RunResult


@dataclass(frozen=True)
class Summary:
    """What one run came to. Times in seconds, rates in tokens per second."""

    ttft_s: float
    inter_token_mean_s: float
    inter_token_p50_s: float
    inter_token_p95_s: float
    decode_tok_s: float
    output_tok_s: float
    total_tok_s: float
    wall_s: float


LOWER_IS_BETTER = {"ttft_s", "inter_token_mean_s", "inter_token_p50_s", "inter_token_p95_s", "wall_s"}


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the two nearest ranks; ``fraction`` is 0 to 1."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(result: RunResult, prompt_tokens: int) -> Summary:
    """Numbers of one run; ``prompt_tokens`` counts all its prompts together.

    ``decode_tok_s`` is the rate after the prompts: new tokens but the first of each request, over the time from the
    mean first token to the mean last one. ``output_tok_s`` has the prompt's time in it, ``total_tok_s`` its tokens too.
    """
    gaps = [gap for request in result.requests for gap in request.inter_token_s]
    new_tokens = sum(len(request.token_ids) for request in result.requests)
    first = statistics.fmean(request.ttft_s for request in result.requests)
    last = statistics.fmean(request.times_s[-1] for request in result.requests)
    return Summary(
        ttft_s=first,
        inter_token_mean_s=statistics.fmean(gaps) if gaps else float("nan"),
        inter_token_p50_s=percentile(gaps, 0.5),
        inter_token_p95_s=percentile(gaps, 0.95),
        decode_tok_s=len(gaps) / (last - first) if last > first else float("nan"),
        output_tok_s=new_tokens / result.wall_s,
        total_tok_s=(new_tokens + prompt_tokens) / result.wall_s,
        wall_s=result.wall_s,
    )


def median_summary(rounds: Sequence[Summary]) -> Summary:
    """The median of every number over the rounds, each on its own."""
    return Summary(
        **{field.name: statistics.median(getattr(r, field.name) for r in rounds) for field in fields(Summary)}
    )


def speedups(ours: Sequence[Summary], theirs: Sequence[Summary]) -> Summary:
    """How many times better ours is, number by number: the median over rounds of the ratio within a round.

    Above 1 always means that ours is better, for times as for rates. Rounds are paired because a shared machine's
    speed drifts far more between rounds than within one.
    """

    def ratio(name: str, mine: Summary, other: Summary) -> float:
        a: float = getattr(mine, name)
        b: float = getattr(other, name)
        return b / a if name in LOWER_IS_BETTER else a / b

    return Summary(
        **{
            field.name: statistics.median(ratio(field.name, a, b) for a, b in zip(ours, theirs, strict=True))
            for field in fields(Summary)
        }
    )


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens two outputs share."""
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))
