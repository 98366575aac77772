"""What every engine under test looks like to the harness, and what a measurement returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol


class PeerUnavailable(RuntimeError):
    """This engine cannot run here; the message says what is missing."""


@dataclass
class RequestTrace:
    """One request: its new tokens, and when each was in the caller's hands, in seconds since the run began."""

    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.times_s[0]

    @property
    def inter_token_s(self) -> list[float]:
        """Gaps between neighbouring tokens."""
        return [later - earlier for earlier, later in zip(self.times_s, self.times_s[1:], strict=False)]


@dataclass
class RunResult:
    """One run of a set of prompts, all submitted at once."""

    wall_s: float
    requests: list[RequestTrace]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunResult:
        """The inverse of ``to_json``."""
        return cls(wall_s=data["wall_s"], requests=[RequestTrace(**request) for request in data["requests"]])


@dataclass
class Score:
    """How likely an engine finds texts: the sum of natural logs of probabilities over the tokens that count."""

    log_probability: float
    tokens: int


class Peer(Protocol):
    """An engine under test. ``load`` once, then ``run`` as often as wanted.

    Greedy decoding, end-of-text ignored: every request yields exactly ``max_tokens`` tokens.
    """

    name: str

    def load(self, model_dir: Path, threads: int, max_streams: int, max_context: int) -> dict[str, Any]:
        """Load the checkpoint; returns versions and the settings chosen. Raises ``PeerUnavailable`` if it cannot."""
        ...

    def run(self, prompts: list[list[int]], max_tokens: int) -> RunResult:
        """Serve all prompts concurrently and return when the last one is complete."""
        ...

    def close(self) -> None:
        """Free what was loaded."""
        ...


class ScoringPeer(Peer, Protocol):
    """An engine that also says how likely a text is."""

    def score(self, texts: list[list[int]], counted: list[list[bool]]) -> Score:
        """All texts together, by token ids, each on its own and no longer than the context. `counted` says which tokens
        count; the first of a text never does."""
        ...
