"""Our metrics under the names that boards made for vLLM look for, where the meaning is the same.

These carry the label `model_name`, so what is shown counts from when this model began to be served: the value now
minus the value then. Nothing is counted twice in the path of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from core.metrics.names import NAMESPACE

ENGINE = "0"
"""vLLM numbers its engines; here there is one."""

HISTOGRAMS = {
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "infer_latency_seconds": ("e2e_request_latency_seconds",),
    "request_queue_seconds": ("request_queue_time_seconds",),
    "request_prefill_seconds": ("request_prefill_time_seconds",),
    "request_decode_seconds": ("request_decode_time_seconds",),
    "request_prompt_tokens": ("request_prompt_tokens",),
    "request_generation_tokens": ("request_generation_tokens",),
}
"""Ours, to vLLM's names, older ones last."""
COUNTERS = {"prompt_tokens": "prompt_tokens", "generation_tokens": "generation_tokens"}
FINISHED = "requests_finished"
ENGINE_METRICS = {
    "requests_running": ("num_requests_running",),
    "requests_waiting": ("num_requests_waiting",),
    "kv_cache_usage_ratio": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "preemptions": ("num_preemptions",),
    "prefix_cache_queries": ("prefix_cache_queries",),
    "prefix_cache_hits": ("prefix_cache_hits",),
}
"""What the engine shows of itself: it belongs to one model anyway."""

Values = Mapping[tuple[str, tuple[str, ...]], float]
"""Samples by name and values of labels."""


class ForeignNames(Collector):
    """`sources` are the collectors that have what is to be shown; `engine` gives the engine's metrics."""

    def __init__(self, sources: Sequence[Collector], engine: Collector) -> None:
        self._sources = tuple(sources)
        self._engine = engine
        self._model: str | None = None
        self._before: Values = {}

    def set_model(self, name: str | None) -> None:
        """This model is served from now on; None: none is, and nothing is shown. The same name changes nothing."""
        if name != self._model:
            self._before = {key: value for family in self._families() for key, value in _values(family)}
            self._model = name

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        model, before = self._model, self._before
        if model is None:
            return
        labels = {"model_name": model, "engine": ENGINE}
        for family in self._families():
            name = family.name.removeprefix(f"{NAMESPACE}_")
            for theirs in HISTOGRAMS.get(name, ()):
                yield _histogram(theirs, family, labels, before)
            if name in COUNTERS:
                (value,) = [value - before.get(key, 0.0) for key, value in _values(family)]
                yield _one(CounterMetricFamily, COUNTERS[name], family, labels, value)
            if name == FINISHED:
                yield _finished(family, labels, before)
        for family in self._engine.collect():
            for theirs in ENGINE_METRICS.get(family.name.removeprefix(f"{NAMESPACE}_"), ()):
                kind = CounterMetricFamily if family.type == "counter" else GaugeMetricFamily
                for sample in family.samples:
                    yield _one(kind, theirs, family, labels, sample.value)

    def _families(self) -> Iterator[Metric]:
        for source in self._sources:
            yield from source.collect()


def _values(family: Metric) -> Iterator[tuple[tuple[str, tuple[str, ...]], float]]:
    for sample in family.samples:
        if not sample.name.endswith("_created"):
            yield (sample.name, tuple(sample.labels.values())), sample.value


def _histogram(name: str, family: Metric, labels: Mapping[str, str], before: Values) -> Metric:
    buckets, total = [], 0.0
    for sample in family.samples:
        value = sample.value - before.get((sample.name, tuple(sample.labels.values())), 0.0)
        if sample.name.endswith("_bucket"):
            buckets.append((sample.labels["le"], value))
        elif sample.name.endswith("_sum"):
            total = value
    made = HistogramMetricFamily(f"vllm:{name}", family.documentation, labels=list(labels))
    made.add_metric(list(labels.values()), buckets, total)
    return made


def _finished(family: Metric, labels: Mapping[str, str], before: Values) -> Metric:
    made = CounterMetricFamily("vllm:request_success", family.documentation, labels=[*labels, "finished_reason"])
    for (name, (reason,)), value in _values(family):
        if reason != "error":
            made.add_metric([*labels.values(), reason], value - before.get((name, (reason,)), 0.0))
    return made


def _one(
    kind: type[CounterMetricFamily | GaugeMetricFamily], name: str, family: Metric, labels: Mapping[str, str],
    value: float,
) -> Metric:  # fmt: skip
    made = kind(f"vllm:{name}", family.documentation, labels=list(labels))
    made.add_metric(list(labels.values()), value)
    return made
