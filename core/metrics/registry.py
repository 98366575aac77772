"""`MetricsRegistry`: every metric, and for each the call that feeds it.

=============================================== =====================================================================
fed by                                          metrics (prefix `vramancer_`)
=============================================== =====================================================================
batcher: `observe_finished`                     infer_total infer_errors_total requests_finished_total
                                                requests_aborted_total infer_latency_seconds request_queue_seconds
                                                request_prefill_seconds request_decode_seconds request_prompt_tokens
                                                request_generation_tokens
batcher: `observe_first_token`                  time_to_first_token_seconds prompt_tokens_total
batcher: `observe_tokens`                       generation_tokens_total inter_token_latency_seconds
transfer manager: `observe_transfer`            gpu_transfer_ops_total gpu_transfer_bandwidth_gbps
                                                transfer_bytes_total transfer_seconds_total
links to other machines: `observe_fastpath`     fastpath_latency_seconds
API: `observe_http`                             api_latency_seconds
API: `count_environment_hit`                    env_endpoint_hits_total
engine keeper: `observe_placement`              orch_placements_total
engine keeper: `observe_migration`              orch_migrations_total orch_rebalance_total
whoever works in the background: `tasks.run`    tasks_* task_duration_*
pipeline: the source of `set_engine_source`     what `core.views` makes of an engine, of the devices, of the network
all of these                                    vllm:* (`core.metrics.foreign`)
prometheus_client                               process_*
=============================================== =====================================================================

`COMING` names what belongs to features that are not in this version, and is absent.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from core.metrics.foreign import ForeignNames
from core.metrics.names import NAMESPACE
from core.metrics.recent import Percentiles
from core.metrics.tasks import TaskLog
from core.request import FinishedRequest

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
HOP_BUCKETS_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
TOKEN_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
FINISH_REASONS = ("stop", "length", "abort", "error")
BANDWIDTH_WINDOW = 64  # transfers that the bandwidth gauge is taken over
BITS_PER_GIGABIT = 1e9
MAX_EXEMPLAR_CHARACTERS = 128
"""Of names and values together, by OpenMetrics."""

LATELY_S = 300.0
"""What people mean by now, for percentiles."""

MetricsSource = Callable[[], Iterable[Metric]]


class MetricsRegistry:
    """The metrics of one pipeline, in `registry` or one of their own. Every method may be called from any thread, but
    for `observe_first_token`, `observe_tokens` and `observe_finished`, which are the engine thread's.

    Histograms of whole requests have exemplars with the request's id, and its trace's if that is recorded, for those
    that ask for OpenMetrics.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self.tasks = TaskLog()
        self._create_requests()
        self._create_traffic()
        self._create_orchestration()
        self._first_tokens, self._gaps, self._requests = Window(1024), Window(8192), Window(1024)
        self._engine = _EngineCollector()
        counted = (*self._phases, self._prompt_tokens, self._output_tokens, self._finished)
        self._foreign = ForeignNames(counted, self._engine)
        self.registry.register(self._engine)
        self.registry.register(self.tasks)
        self.registry.register(self._foreign)
        ProcessCollector(namespace=NAMESPACE, registry=self.registry)

    def _create_requests(self) -> None:
        counter, histogram = self._counter, self._histogram
        self._infer = counter("infer_total", "Generation requests that ended, in whatever way.")
        self._infer_errors = counter("infer_errors_total", "Generation requests that ended in an error of the server.")
        self._finished = counter("requests_finished_total", "Generation requests that ended, by reason.", "reason")
        for reason in FINISH_REASONS:
            self._finished.labels(reason)
        self._aborted = counter("requests_aborted_total", "Generation requests given up by their client.")
        self._prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of requests that had their first token.")
        self._output_tokens = counter("generation_tokens_total", "Tokens generated.")
        self._infer_latency = histogram("infer_latency_seconds", "From submission to the last token.")
        self._first_token = histogram("time_to_first_token_seconds", "From submission to the first token.")
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Between two outputs of one request.", buckets=TOKEN_BUCKETS_S
        )
        self._queue = histogram("request_queue_seconds", "From submission until a step computes the first of it.")
        self._prefill = histogram("request_prefill_seconds", "From the first step to the first token.")
        self._decode = histogram("request_decode_seconds", "From the first token to the last.")
        self._prompt_sizes = histogram("request_prompt_tokens", "Tokens of a prompt.", buckets=TOKEN_COUNTS)
        self._output_sizes = histogram("request_generation_tokens", "Tokens of an answer.", buckets=TOKEN_COUNTS)
        self._phases = (
            self._infer_latency, self._first_token, self._inter_token, self._queue, self._prefill, self._decode,
            self._prompt_sizes, self._output_sizes,
        )  # fmt: skip

    def _create_traffic(self) -> None:
        counter, ends = self._counter, ("method", "src", "dst")
        self._transfers = counter("gpu_transfer_ops_total", "Tensor transfers between devices.", *ends)
        self._transfer_bytes = counter("transfer_bytes_total", "Bytes sent between devices.", *ends)
        self._transfer_seconds = counter("transfer_seconds_total", "Time spent sending.", *ends)
        self._bandwidth = Gauge(
            "gpu_transfer_bandwidth_gbps",
            f"Gigabits per second over the last {BANDWIDTH_WINDOW} transfers of a method.",
            ("method",),
            namespace=NAMESPACE,
            registry=self.registry,
        )
        self._recent: dict[str, deque[tuple[int, float]]] = {}
        self._recent_lock = threading.Lock()
        self._fastpath = self._histogram(
            "fastpath_latency_seconds", "Operations on links to other machines.", "method", "op", buckets=HOP_BUCKETS_S
        )
        help_text = "From request to the end of the answer, streams included."
        self._api_latency = self._histogram("api_latency_seconds", help_text, "path", "method", "status")
        self._environment_hits = counter(
            "env_endpoint_hits_total", "Requests that ask about the machine: /api/system, /api/gpu and /api/nodes."
        )

    def _create_orchestration(self) -> None:
        help_text = "Placements that began to serve, by the farthest memory that they keep weights in."
        self._placements = self._counter("orch_placements_total", help_text, "level")
        help_text = "Layers that were moved to another device while the model served."
        self._migrations = self._counter("orch_migrations_total", help_text)
        help_text = "Times that the server moved the model by itself, because a device was lost."
        self._rebalances = self._counter("orch_rebalance_total", help_text)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, labels, namespace=NAMESPACE, registry=self.registry)

    def _histogram(
        self, name: str, help_text: str, *labels: str, buckets: tuple[float, ...] = LATENCY_BUCKETS_S
    ) -> Histogram:
        return Histogram(name, help_text, labels, namespace=NAMESPACE, registry=self.registry, buckets=buckets)

    # -- requests, told by the engine thread ------------------------------------------------------------------------

    def observe_first_token(self, seconds: float, prompt_tokens: int, request_id: str, trace_id: str = "") -> None:
        """A request's first token came `seconds` after its submission."""
        self._first_token.observe(seconds, _exemplar(request_id, trace_id))
        self._first_tokens.add(seconds)
        self._prompt_tokens.inc(prompt_tokens)

    def observe_tokens(self, count: int, seconds: float | None) -> None:
        """A request got `count` tokens more, `seconds` after those before; None for the first."""
        self._output_tokens.inc(count)
        if seconds is not None:
            self._inter_token.observe(seconds)
            self._gaps.add(seconds)

    def observe_finished(self, request: FinishedRequest) -> None:
        """A generation request ended."""
        self._infer.inc()
        self._finished.labels(request.reason).inc()
        if request.started_s is not None:
            self._queue.observe(request.started_s - request.submitted_s)
            if request.first_token_s is not None:
                self._prefill.observe(request.first_token_s - request.started_s)
        if request.reason == "abort":  # its duration says when the client left, not how fast the server was
            self._aborted.inc()
            return
        if request.reason == "error":
            self._infer_errors.inc()
        else:
            self._prompt_sizes.observe(request.prompt_tokens)
            self._output_sizes.observe(request.output_tokens)
            if request.first_token_s is not None:
                self._decode.observe(request.ended_s - request.first_token_s)
        seconds = request.ended_s - request.submitted_s
        trace_id = request.trace.trace_id if request.trace is not None else ""
        self._infer_latency.observe(seconds, _exemplar(request.request_id, trace_id))
        self._requests.add(seconds)

    def latency(self) -> dict[str, Percentiles]:
        """Percentiles of the last minutes: to the first token, between tokens, of whole requests."""
        windows = {"first_token": self._first_tokens, "between_tokens": self._gaps, "request": self._requests}
        return {name: window.percentiles() for name, window in windows.items()}

    # -- other events -----------------------------------------------------------------------------------------------

    def observe_transfer(self, method: str, src: str, dst: str, nbytes: int, seconds: float) -> None:
        """A tensor of `nbytes` went from device `src` to `dst` in `seconds`."""
        self._transfers.labels(method, src, dst).inc()
        self._transfer_bytes.labels(method, src, dst).inc(nbytes)
        self._transfer_seconds.labels(method, src, dst).inc(seconds)
        with self._recent_lock:
            recent = self._recent.setdefault(method, deque(maxlen=BANDWIDTH_WINDOW))
            recent.append((nbytes, seconds))
            moved_bytes = sum(size for size, _ in recent)
            spent_s = sum(duration for _, duration in recent)
        if spent_s > 0:
            self._bandwidth.labels(method).set(moved_bytes * 8 / spent_s / BITS_PER_GIGABIT)

    def observe_fastpath(self, method: str, op: str, seconds: float) -> None:
        """An operation on a link to another machine, over a transport: a heartbeat there and back (`round_trip`), or
        handing a tensor to the network (`send`)."""
        self._fastpath.labels(method, op).observe(seconds)

    def observe_http(
        self, path: str, method: str, status: int, seconds: float, request_id: str = "", trace_id: str = ""
    ) -> None:
        """One HTTP request was answered. `path` is the URL rule, so that the label has few values."""
        self._api_latency.labels(path, method, str(status)).observe(seconds, _exemplar(request_id, trace_id))

    def count_environment_hit(self) -> None:
        """A client asked about the machine."""
        self._environment_hits.inc()

    def observe_placement(self, *, streams: bool) -> None:
        """A placement began to serve; `streams`: layers stream in from main memory (L3), else all are on devices."""
        self._placements.labels("L3" if streams else "L1").inc()

    def observe_migration(self, layers: int, *, unasked: bool) -> None:
        """A running model was moved, with so many layers on another device; `unasked`: because a device was lost."""
        self._migrations.inc(layers)
        self._rebalances.inc(unasked)

    def set_model(self, name: str | None) -> None:
        """The model that is served from now on, for metrics that name it."""
        self._foreign.set_model(name)

    # -- scrapes ----------------------------------------------------------------------------------------------------

    def set_engine_source(self, source: MetricsSource | None) -> None:
        """Ask `source` for the engine's metrics at each scrape; None shows no such metric."""
        self._engine.source = source


def _exemplar(request_id: str, trace_id: str = "") -> dict[str, str] | None:
    """`trace_id` is empty where no trace is recorded."""
    if not request_id:
        return None
    labels = {"request_id": request_id} | ({"trace_id": trace_id} if trace_id else {})
    over = sum(len(name) + len(value) for name, value in labels.items()) - MAX_EXEMPLAR_CHARACTERS
    return labels | {"request_id": request_id[: len(request_id) - over]} if over > 0 else labels


class Window:
    """The last `size` durations, with the time of each. One thread adds, any thread reads. `clock` gives seconds."""

    def __init__(self, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._at_s = array("d", bytes(8 * size)), array("d", bytes(8 * size))
        self._size = size
        self._added = 0
        self._clock = clock

    def add(self, seconds: float) -> None:
        slot = self._added % self._size
        self._seconds[slot], self._at_s[slot] = seconds, self._clock()
        self._added += 1

    def values(self) -> list[float]:
        """What came in the last `LATELY_S` seconds, as far as it is kept; in no order."""
        kept = min(self._added, self._size)
        since_s = self._clock() - LATELY_S
        seconds, at_s = self._seconds[:kept], self._at_s[:kept]
        return [value for value, when in zip(seconds, at_s, strict=True) if when >= since_s]

    def percentiles(self) -> Percentiles:
        """Of `values`."""
        return Percentiles.of(self.values())


class _EngineCollector(Collector):
    """Asks for the engine's metrics whenever Prometheus asks."""

    def __init__(self) -> None:
        self.source: MetricsSource | None = None

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        return self.source() if self.source is not None else ()
