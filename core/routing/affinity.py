"""Which replica serves a request: the one that is expected to have answered it first.

Routers for equal replicas weigh a cached prefix against load by thresholds (SGLang: the longest match, unless one queue
is much longer than another; llm-d: a weighted sum of scores). Replicas here are not equal, so both are put into
seconds::

    cost = (W + p - c) / F  +  max(0, n + 1 - n_max) / n_max * o * t  +  o * t

W are prompt tokens that wait there, p - c those of this prompt that are not cached, F its prefill rate; n streams run
or wait and n_max can run; o tokens are expected, t seconds apart with one stream more. A cached prefix counts as what
it spares there, and a slow replica with a prefix loses to a fast one without where that is sooner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

EXPECTED_OUTPUT_TOKENS = 200
"""Where nothing is known of the answer's length: about the mean of published chat traces."""
MOST_MATCHED = 8
MOST_DRAWN = 16


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a router knows of a replica.

    Attributes:
        name: of the replica.
        waiting_tokens: of prompts that are queued or under way there and not computed yet.
        prefill_tok_s: prompt tokens per second.
        streams: requests there, running and waiting.
        max_streams: that its KV holds at the same time, at least 1.
        token_s: seconds between two tokens of a stream with one stream more than now.
    """

    name: str
    waiting_tokens: int
    prefill_tok_s: float
    streams: int
    max_streams: int
    token_s: float


def cost_s(load: ReplicaLoad, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> float:
    """Expected seconds until the whole answer is there."""
    fresh = max(1, prompt_tokens - cached_tokens)  # at least the last token is computed
    first_s = (load.waiting_tokens + fresh) / load.prefill_tok_s
    answer_s = output_tokens * load.token_s
    queued = max(0, load.streams + 1 - load.max_streams) / load.max_streams
    return first_s + (1 + queued) * answer_s


def choose(
    loads: Sequence[ReplicaLoad],
    prompt_tokens: int,
    cached_tokens: Mapping[str, int],
    output_tokens: int = EXPECTED_OUTPUT_TOKENS,
) -> ReplicaLoad | None:
    """The replica with the least `cost_s`; of equal ones the one with fewer streams, then the first. None: no replica.

    `cached_tokens`: of the prompt, by name; replicas that are not in it have none.
    """
    return min(
        loads,
        key=lambda load: (cost_s(load, prompt_tokens, cached_tokens.get(load.name, 0), output_tokens), load.streams),
        default=None,
    )


def candidates(names: Sequence[str], cached_tokens: Mapping[str, int], draw: int) -> list[str]:
    """The replicas worth a look where there are many: those with the longest cached prefixes, and some of the others.

    `draw` is any number, another one for each request: it says which others. Of a few that are drawn the least loaded
    one is about as good as the least loaded of all (power of several choices), and looking costs the same in any fleet.
    """
    if len(names) <= MOST_DRAWN:
        return list(names)
    here = set(names)
    matched = sorted((name for name in cached_tokens if name in here), key=lambda name: -cached_tokens[name])
    step = len(names) // MOST_DRAWN
    drawn = names[draw % step :: step][:MOST_DRAWN]
    return list(dict.fromkeys((*matched[:MOST_MATCHED], *drawn)))


def with_request(load: ReplicaLoad, prompt_tokens: int, cached_tokens: int) -> ReplicaLoad:
    """The load once a request has been routed there; how long tokens take is left as it was."""
    fresh = max(1, prompt_tokens - cached_tokens)
    return replace(load, waiting_tokens=load.waiting_tokens + fresh, streams=load.streams + 1)
