"""What a real server sends of requests to a real collector."""

from __future__ import annotations

import http.client
import json
import threading
from typing import Any

import pytest
from steering import LONGEST_WAIT_S, until
from tracing.collector import Collector, Span
from tracing.conftest import HEADERS, STAGES, Open, Service

ROUTE = "POST /v1/completions"
PHASES = ("queue", "prefill", "decode")
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def tree(collector: Collector) -> tuple[Span, dict[str, Span]]:
    """The only request's span, and those of its phases."""
    server = collector.one(ROUTE)
    until(lambda: len(collector.children(server)) >= len(PHASES), "its phases")
    return server, collector.children(server)


def test_a_request_and_its_phases(service: Service, collector: Collector) -> None:
    status, text = service.complete(6, temperature=0.5, top_k=7)
    answer = json.loads(text)
    server, phases = tree(collector)
    assert (status, server.kind, server.status, server.parent) == (200, "server", "unset", "")
    assert tuple(sorted(phases, key=lambda name: phases[name].began_ns)) == PHASES
    assert all(server.holds(phase) and phase.trace == server.trace for phase in phases.values())
    queue, prefill, decode = (phases[name] for name in PHASES)
    assert (queue.ended_ns, prefill.ended_ns) == (prefill.began_ns, decode.began_ns)
    expected = {
        "http.request.method": "POST", "http.route": "/v1/completions", "http.response.status_code": 200,
        "url.path": "/v1/completions", "url.scheme": "http", "client.address": "127.0.0.1",
        "network.protocol.version": "1.1", "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "vramancer", "gen_ai.request.model": service.pipeline.model.name,
        "gen_ai.response.model": service.pipeline.model.name, "gen_ai.response.id": answer["id"],
        "gen_ai.request.max_tokens": 6, "gen_ai.request.temperature": 0.5, "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 1, "gen_ai.usage.input_tokens": 4, "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 0, "gen_ai.response.finish_reasons": ["length"],
    }  # fmt: skip
    assert {name: server.attributes.get(name) for name in expected} == expected
    assert server.resource["service.name"] == "vramancer"
    assert {phase.attributes["vramancer.request.id"] for phase in phases.values()} == {f"{answer['id']}-0"}
    assert prefill.attributes["gen_ai.usage.input_tokens"] == 4
    assert decode.attributes["gen_ai.usage.output_tokens"] == 6
    assert decode.attributes["vramancer.request.finish_reason"] == "length"
    assert "vramancer.request.finish_reason" not in prefill.attributes


def test_what_each_stage_did_for_it(service: Service, collector: Collector) -> None:
    service.complete(6)
    _, phases = tree(collector)
    for name, steps in (("prefill", 1), ("decode", 5)):
        phase = phases[name]
        stages = collector.children(phase)
        assert sorted(stages) == [f"stage {stage}" for stage in STAGES]
        for stage in STAGES:
            span = stages[f"stage {stage}"]
            assert phase.holds(span)
            assert span.attributes["vramancer.stage.name"] == stage
            assert span.attributes["vramancer.stage.steps"] == steps
        busy_s = [span.attributes["vramancer.stage.busy_seconds"] for span in stages.values()]
        assert all(seconds > 0 for seconds in busy_s)
        assert sum(busy_s) * 1e9 <= phase.ended_ns - phase.began_ns, "they take turns within the phase"
    assert collector.children(phases["queue"]) == {}


def test_a_stream_ends_its_span_when_it_ends(service: Service, collector: Collector) -> None:
    _, events = service.complete(8, stream=True)
    assert events.endswith("data: [DONE]\n\n")
    server, phases = tree(collector)
    assert server.holds(phases["decode"])
    assert server.attributes["gen_ai.usage.output_tokens"] == 8
    assert server.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert "vramancer.answer.given_up" not in server.attributes


def test_two_samples_of_a_prompt(service: Service, collector: Collector) -> None:
    service.complete(5, n=2)
    server, phases = tree(collector)
    assert sorted(phases) == sorted(PHASES)
    assert server.attributes["gen_ai.request.choice.count"] == 2
    assert server.attributes["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert server.attributes["gen_ai.usage.output_tokens"] == 10
    stages = collector.children(phases["decode"])
    steps = {span.attributes["vramancer.stage.steps"] for span in stages.values()}
    assert len(steps) == 1 and 4 <= steps.pop() <= 6, "a step with both of them is one step"


def test_several_prompts(service: Service, collector: Collector) -> None:
    service.complete(3, prompt=[[5, 6], [7, 8, 9]])
    server = collector.one(ROUTE)
    until(lambda: len(collector.named("decode")) == 2, "both prompts")
    assert server.attributes["vramancer.prompts"] == 2
    assert server.attributes["gen_ai.usage.input_tokens"] == 5
    for name in PHASES:
        found = collector.named(name)
        assert {span.parent for span in found} == {server.id} and len(found) == 2
        assert {span.attributes["vramancer.request.id"][-2:] for span in found} == {"-0", "-1"}


def test_a_chat_and_numbers(service: Service, collector: Collector) -> None:
    service.ask("POST", "/api/infer", {"token_ids": [5, 6, 7]})
    service.ask("POST", "/api/generate", {"prompt_token_ids": [5, 6], "max_tokens": 2})
    infer, generate = collector.one("POST /api/infer"), collector.one("POST /api/generate")
    assert infer.attributes["gen_ai.operation.name"] == "infer"
    assert generate.attributes["gen_ai.operation.name"] == "text_completion"
    until(lambda: set(collector.children(infer)) == {"queue", "prefill"}, "numbers are made in one go")
    assert collector.children(infer)["prefill"].attributes["vramancer.request.finish_reason"] == "stop"


def hold_after(service: Service, monkeypatch: pytest.MonkeyPatch, steps: int) -> threading.Event:
    """Steps wait for the event after the first few."""
    gate, runner = threading.Event(), service.pipeline.engine.batcher._runner
    execute, counted = runner.execute, iter(range(10_000))

    def slowly(output: Any) -> Any:
        assert next(counted) < steps or gate.wait(LONGEST_WAIT_S)
        return execute(output)

    monkeypatch.setattr(runner, "execute", slowly)
    return gate


def test_a_client_that_leaves(service: Service, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = hold_after(service, monkeypatch, 4)
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=LONGEST_WAIT_S)
    body = {"prompt": [3, 4, 5], "max_tokens": 300, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
    connection.getresponse().read(50)
    connection.close()
    gate.set()
    server = collector.one(ROUTE)
    assert server.attributes["vramancer.answer.given_up"] is True
    assert server.status == "unset", "that is no error of the server"
    decode = collector.one("decode")
    assert decode.parent == server.id
    assert decode.attributes["vramancer.request.finish_reason"] == "abort"
    assert server.attributes["gen_ai.usage.output_tokens"] <= decode.attributes["gen_ai.usage.output_tokens"] < 300


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails(
    service: Service, collector: Collector, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def broken(output: Any) -> Any:
        raise RuntimeError("a kernel broke")

    monkeypatch.setattr(service.pipeline.engine.batcher._runner, "execute", broken)
    status, _ = service.complete(6, stream=stream)
    server = collector.one(ROUTE)
    assert server.attributes["http.response.status_code"] == status == (200 if stream else 500)
    assert server.status == "error" and "a kernel broke" in server.message
    assert server.attributes["error.type"] == "step_failed"
    prefill = collector.one("prefill")
    assert (prefill.status, prefill.attributes["vramancer.request.finish_reason"]) == ("error", "error")
    assert collector.children(prefill) == {}, "no step of it came back"
    assert collector.one("queue").status == "unset"


def test_what_a_client_did_wrong_is_no_error_of_the_server(service: Service, collector: Collector) -> None:
    assert service.complete(6, model="another")[0] == 404
    server = collector.one(ROUTE)
    assert (server.status, server.attributes["error.type"]) == ("unset", "model_not_found")
    assert server.attributes["gen_ai.request.model"] == "another"
    assert server.attributes["http.response.status_code"] == 404


def test_a_bug_is_an_error(service: Service, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise ZeroDivisionError("a secret may be in it")

    monkeypatch.setattr(service.pipeline, "submit_many", broken)
    assert service.complete(6)[0] == 500
    server = collector.one(ROUTE)
    assert (server.status, server.message) == ("error", "")
    assert server.attributes["error.type"] == "ZeroDivisionError"


def test_the_callers_trace_goes_on(service: Service, collector: Collector) -> None:
    service.complete(3, {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "a=1,b@c=two words"})
    server, phases = tree(collector)
    assert (server.trace, server.parent, server.state) == (TRACE, CALLER, "a=1,b@c=two words")
    for span in (*phases.values(), *collector.children(phases["decode"]).values()):
        assert (span.trace, span.state) == (TRACE, server.state)


def test_a_caller_who_does_not_record_is_not_recorded(service: Service, collector: Collector) -> None:
    unsampled = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
    service.complete(3, unsampled)
    assert service.ask("POST", "/api/models/load", {"model": "/nowhere"}, **unsampled)[0] == 404
    service.complete(3)
    service.end()
    assert len(collector.named("queue")) == len(collector.named(ROUTE)) == 1
    assert not [span for span in collector.spans if span.trace == TRACE]
    assert len(collector.named("task load")) == 1, "the first one, which nobody asked for"


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": "00-zz-01"},
        {"traceparent": f"00-{'0' * 32}-{CALLER}-01"},
        {"traceparent": f"ff-{TRACE}-{CALLER}-01"},
        {"tracestate": "a=1"},
    ],
)
def test_a_broken_header_begins_a_trace(service: Service, collector: Collector, headers: dict[str, str]) -> None:
    assert service.complete(2, headers)[0] == 200
    server = collector.one(ROUTE)
    assert server.parent == "" and server.trace not in (TRACE, "0" * 32) and server.state == ""


def test_the_ratio_is_for_those_whose_callers_do_not_say(collector: Collector, open_service: Open) -> None:
    service = open_service(tracing__sample_ratio=0.0)
    service.complete(2)
    service.complete(2, {"traceparent": f"00-{TRACE}-{CALLER}-01"})
    service.end()
    assert {span.trace for span in collector.spans} == {TRACE}
    assert len(collector.named(ROUTE)) == 1


def test_who_only_looks_is_not_traced_and_nor_is_who_may_not(service: Service, collector: Collector) -> None:
    for path in ("/live", "/health", "/metrics", "/v1/models", "/api/pipeline/status"):
        assert service.ask("GET", path)[0] == 200
    sampled = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    assert service.complete(2, {"Authorization": "Bearer wrong", **sampled})[0] == 401
    assert service.ask("POST", "/nowhere", **sampled)[0] == 404
    service.end()
    assert {span.name for span in collector.spans} == {"task load"}


def test_stages_at_the_same_time(collector: Collector, open_service: Open) -> None:
    """Several steps in flight: each request has the steps that it was part of, by both stages."""
    service = open_service(engine__cohorts=2)
    clients = [threading.Thread(target=service.complete, args=(10,)) for _ in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(LONGEST_WAIT_S)
    service.end()
    decodes = collector.named("decode")
    assert len(decodes) == 4
    for decode in decodes:
        stages = collector.children(decode)
        assert sorted(stages) == [f"stage {stage}" for stage in STAGES]
        assert {span.attributes["vramancer.stage.steps"] for span in stages.values()} == {9}
        assert all(span.attributes["vramancer.stage.busy_seconds"] > 0 for span in stages.values())


def test_a_model_that_moves_in_the_middle(
    service: Service, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request goes on in another engine, and so do its notes."""
    gate = hold_after(service, monkeypatch, 4)
    client = threading.Thread(target=service.complete, args=(50,))
    client.start()
    until(lambda: service.pipeline.engine.batcher.stats.running, "it runs")
    place = {"devices": "cpu=64MiB,cpu=64MiB", "layers": "1,3"}
    mover = threading.Thread(target=service.ask, args=("POST", "/api/pipeline/place", place))
    mover.start()
    until(lambda: service.pipeline.loading, "it is being moved")
    gate.set()
    client.join(LONGEST_WAIT_S)
    mover.join(LONGEST_WAIT_S)
    assert [stage.num_layers for stage in service.pipeline.engine.plan.placement.stages] == [1, 3]
    _, phases = tree(collector)
    decode = phases["decode"]
    assert decode.attributes["gen_ai.usage.output_tokens"] == 50
    stages = collector.children(decode)
    assert sorted(stages) == [f"stage {stage}" for stage in STAGES]
    assert {span.attributes["vramancer.stage.steps"] for span in stages.values()} == {49}
