"""One address that answers for a model: whether it is asked, what runs there, and how fast it was."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from core.config import BackendSettings, UpstreamSettings
from core.config_backend import SELF
from core.errors import UpstreamUnavailableError
from core.routing.affinity import ReplicaLoad
from core.upstreams.breaker import Breaker, State
from core.upstreams.prompt import Prompt

FIRST_PREFILL_TOK_S = 1000.0
FIRST_TOKEN_S = 0.05
"""What a replica is thought to do until it has been seen: the same for all, so that load decides."""
FIRST_MAX_STREAMS = 16
LATEST = 0.2
"""Weight of the last measurement in a mean that forgets."""
OUTCOMES = ("ok", "refused", "error", "aborted")
"""How calls end: answered; answered that the request is wrong; failed; given up by the client."""


@dataclass(frozen=True, slots=True)
class Reported:
    """What a server says of its own load: requests that run and wait, prompt tokens of those that wait, and how many
    can run."""

    running: int
    waiting: int
    waiting_tokens: int
    max_streams: int


@dataclass(slots=True)
class _Learned:
    prefill_tok_s: float = FIRST_PREFILL_TOK_S
    token_s: float = FIRST_TOKEN_S


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica at one moment. `url` is None for the model loaded here; `backend` is what the server was found to be;
    `reachable` is None until it was looked at; `breaker` is closed, open or half_open."""

    url: str | None
    backend: str
    model: str | None
    reachable: bool | None
    breaker: State
    failures: int
    last_error: str | None
    in_flight: int
    calls: dict[str, int] = field(default_factory=dict)


class Replica:
    """Thread-safe."""

    def __init__(self, settings: UpstreamSettings, backend: BackendSettings) -> None:
        self.settings = settings
        self.is_self = settings.url == SELF
        self.name = settings.url if settings.model is None else f"{settings.url}#{settings.model}"
        self.model = settings.model
        self.kind = settings.backend
        self.breaker = Breaker(backend.breaker_failures, backend.breaker_reset_s)
        self.reachable: bool | None = None
        self.trouble: str | None = None
        """What was wrong when it was looked at last."""
        self.reported: Reported | None = None
        self._key = backend.key_of(settings)
        self._lock = threading.Lock()
        self._in_flight = 0
        self._waiting_tokens = 0
        self._learned = _Learned()
        self._calls = dict.fromkeys(OUTCOMES, 0)

    @property
    def headers(self) -> dict[str, str]:
        """What proves that we may ask."""
        return {"Authorization": f"Bearer {self._key}"} if self._key is not None else {}

    @property
    def base_url(self) -> str:
        """Of the OpenAI-compatible routes."""
        return self.settings.url

    @property
    def root_url(self) -> str:
        """Of the server's other routes."""
        return self.settings.url.removesuffix("/v1")

    def enter(self, prompt: Prompt) -> None:
        """A call begins; it ends with `leave`.

        Raises:
            UpstreamUnavailableError: it failed too often of late.
        """
        if not self.breaker.enter():
            left_s = self.breaker.left_s
            raise UpstreamUnavailableError(
                f"{self.settings.name} at {self.settings.url} has failed {self.breaker.failures} times in a row (last: "
                f"{self.breaker.last_error}); it is not asked for {left_s:.0f} s.",
                retry_after_s=max(1.0, left_s),
            )
        with self._lock:
            self._in_flight += 1
            self._waiting_tokens += prompt.tokens

    def leave(self, prompt: Prompt, outcome: str, error: str | None, *, computed: bool) -> None:
        """A call has ended. `error`: what was wrong with the replica; `computed`: `saw_first` was told of it."""
        if error is not None:
            self.breaker.failed(error)
        elif outcome == "aborted" and not computed:
            self.breaker.gave_up()
        else:
            self.breaker.succeeded()
            self.reachable = True
        with self._lock:
            self._calls[outcome] += 1
            self._in_flight -= 1
            if not computed:
                self._waiting_tokens -= prompt.tokens

    def saw_first(self, prompt: Prompt, fresh_tokens: int, seconds: float) -> None:
        """The answer has begun, `seconds` after the call."""
        with self._lock:
            self._waiting_tokens -= prompt.tokens
            rate = max(1.0, fresh_tokens) / max(seconds, 1e-3)
            self._learned.prefill_tok_s += LATEST * (rate - self._learned.prefill_tok_s)

    def saw_next(self, seconds: float) -> None:
        """One token came after another."""
        with self._lock:
            self._learned.token_s += LATEST * (max(seconds, 1e-5) - self._learned.token_s)

    def load(self, own: Reported | None) -> ReplicaLoad:
        """For the router: what is under way from here, and what the server says of itself (`own`: ours)."""
        reported = own if self.is_self else self.reported
        with self._lock:
            streams, waiting = self._in_flight, self._waiting_tokens
            learned = self._learned
            if reported is not None:
                streams = max(streams, reported.running + reported.waiting)
                waiting = max(waiting, reported.waiting_tokens)
            most = reported.max_streams if reported is not None else FIRST_MAX_STREAMS
            return ReplicaLoad(self.name, waiting, learned.prefill_tok_s, streams, max(1, most), learned.token_s)

    def view(self) -> ReplicaView:
        with self._lock:
            calls, in_flight = dict(self._calls), self._in_flight
        return ReplicaView(
            url=None if self.is_self else self.settings.url, backend="engine" if self.is_self else self.kind,
            model=self.model, reachable=self.reachable, breaker=self.breaker.state, failures=self.breaker.failures,
            last_error=self.breaker.last_error if self.breaker.failures else self.trouble, in_flight=in_flight,
            calls=calls,
        )  # fmt: skip
