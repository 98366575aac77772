"""Several servers that answer for one model: which is asked, and what happens when one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from upstreams.conftest import Ours, entry
from upstreams.servers import CHAT, MODEL, NAME, Talk, Upstream, dying, refusing, unused_url, upstream, whole

from core.errors import QueueFullError

GREEDY = {**CHAT, "temperature": 0}
LONG = "One long document that everybody asks about. " * 20


@pytest.fixture
def two() -> Iterator[list[Upstream]]:
    with ExitStack() as stack:
        yield [stack.enter_context(upstream()) for _ in range(2)]


def asking(prefix: str, question: str) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "system", "content": prefix}, {"role": "user", "content": question}]}


def texts(events: list[Any]) -> str:
    return "".join(
        event["choices"][0]["delta"].get("content") or "" for event in events[:-1] if event.get("choices")
    )  # fmt: skip


def test_load_is_shared(ours: Callable[..., Ours], two: list[Upstream]) -> None:
    """While one request is under way at a replica, the next one goes to the other."""
    server = ours(*map(entry, two))
    inner: list[Any] = []

    def ask_again(talk: Talk) -> None:
        if not inner:
            inner.append(None)
            inner[0] = server.app.test_client().post(
                "/v1/chat/completions", json=CHAT, headers=server.client.headers
            ).status_code  # fmt: skip
        whole("Hello")(talk)

    for each in two:
        each.behave = ask_again
    assert server.client.post("/v1/chat/completions", CHAT).status_code == 200
    assert inner == [200]
    assert [each.asked() for each in two] == [1, 1]


def test_prompts_that_begin_alike_go_to_the_same_replica(
    ours: Callable[..., Ours], two: list[Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.upstreams.replica.LATEST", 0.0)  # nothing is learned from this machine's noise
    server = ours(*map(entry, two))
    for replica, rate in zip(server.replicas, (1000.0, 900.0), strict=True):
        replica._learned.prefill_tok_s = rate
    replica = server.replicas[1]
    server.pipeline.upstreams.groups()[0].routed(replica, read(asking(LONG, "first")))
    for number in range(4):
        server.client.post("/v1/chat/completions", asking(LONG, f"question {number}"))
    assert [each.asked() for each in two] == [0, 4]
    server.client.post("/v1/chat/completions", asking("something else " * 40, "question"))
    assert [each.asked() for each in two] == [1, 4], "what begins otherwise goes to the faster one"


def read(body: dict[str, Any]) -> Any:
    from core.upstreams.prompt import read_prompt

    return read_prompt(body)


FAILING: list[Callable[[Talk], None]] = [
    lambda talk: talk.die(),
    refusing(500),
    refusing(503),
    refusing(429),
    refusing(401),
]


@pytest.mark.parametrize("behave", FAILING)
@pytest.mark.parametrize("stream", [False, True])
def test_who_fails_before_the_first_byte_is_replaced(
    ours: Callable[..., Ours], two: list[Upstream], behave: Callable[[Talk], None], stream: bool
) -> None:
    two[0].behave = behave
    server = ours(*map(entry, two))
    if stream:
        assert texts(server.client.events("/v1/chat/completions", CHAT)) == "Hello"
    else:
        assert server.client.post("/v1/chat/completions", CHAT).status_code == 200
    assert [each.asked() for each in two] == [1, 1]
    assert server.pipeline.upstreams.groups()[0].moved == 1


def test_what_is_wrong_with_a_request_is_not_tried_elsewhere(ours: Callable[..., Ours], two: list[Upstream]) -> None:
    two[0].behave = refusing(400, "too long")
    server = ours(*map(entry, two))
    assert server.client.post("/v1/chat/completions", CHAT).status_code == 400
    assert [each.asked() for each in two] == [1, 0]


def test_who_is_known_to_be_gone_is_asked_last(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours({"name": NAME, "url": unused_url(), "model": MODEL}, entry(other))
    server.pipeline.upstreams.look()
    assert server.client.post("/v1/chat/completions", CHAT).status_code == 200
    assert server.replicas[0].view().calls["error"] == 0


def test_if_all_fail_the_last_error_is_the_answer(ours: Callable[..., Ours], two: list[Upstream]) -> None:
    for each in two:
        each.behave = refusing(500, "boom")
    server = ours(*map(entry, two), breaker_failures=1)
    assert server.client.error("/v1/chat/completions", CHAT, status=502)["code"] == "upstream_failed"
    assert server.client.error("/v1/chat/completions", CHAT, status=503)["code"] == "upstream_unavailable"
    assert [each.asked() for each in two] == [1, 1]


def test_our_own_model_may_be_a_replica(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours({"name": NAME, "url": "self"}, entry(other))
    server.pipeline.reply = "ours"
    other.behave = whole("theirs")
    answer = server.client.post("/v1/chat/completions", CHAT).get_json()
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == (NAME, "ours")
    assert texts(server.client.events("/v1/chat/completions", CHAT)) in ("ours", "theirs")
    server.pipeline.refusal = QueueFullError("full")
    answer = server.client.post("/v1/chat/completions", CHAT).get_json()
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == (NAME, "theirs")
    assert all(replica.view().in_flight == 0 for replica in server.replicas)


def test_without_our_model_the_others_answer(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours({"name": NAME, "url": "self"}, entry(other))
    server.pipeline.unload()
    assert server.client.post("/v1/chat/completions", CHAT).status_code == 200
    assert other.asked() == 1


# -- replicas that are lost in mid-stream ------------------------------------------------------------------------------


def peers(two: list[Upstream], lost: str, other: str) -> list[dict[str, Any]]:
    two[0].behave, two[1].behave = dying(lost), whole(other)
    for each in two:
        each.owner = "vramancer"
    return [entry(each) for each in two]


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 0.0, "n": 1}, {"seed": 7}])
@pytest.mark.parametrize("lost", ["H", "Hel", "Hello"])
def test_a_determined_stream_goes_on_elsewhere(
    ours: Callable[..., Ours], two: list[Upstream], how: dict[str, Any], lost: str
) -> None:
    events = ours(*peers(two, lost, "Hello")).client.events("/v1/chat/completions", {**CHAT, **how})
    assert texts(events) == "Hello"
    assert events[-1] == "[DONE]"
    assert [each.asked() for each in two] == [1, 1]
    assert two[1].seen[0][2]["messages"] == CHAT["messages"], "the whole request, not prompt and text so far"
    assert {event["id"] for event in events[:-1]} == {"theirs"}


def test_pieces_need_not_be_the_same(ours: Callable[..., Ours], two: list[Upstream]) -> None:
    def in_threes(talk: Talk) -> None:
        talk.open_stream()
        talk.event({"id": "second", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for piece in ("Hel", "lo, ", "you"):
            talk.text(piece, id="second")
        talk.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        talk.event(b"[DONE]")

    entries = peers(two, "Hell", "")
    two[1].behave = in_threes
    events = ours(*entries).client.events("/v1/chat/completions", GREEDY)
    assert texts(events) == "Hello, you"
    assert events[4]["choices"][0]["delta"]["content"] == "o, "
    assert {event["id"] for event in events[:-1]} == {"theirs"}


@pytest.mark.parametrize("second", ["Hallo", "He", "H"])
def test_a_stream_that_would_go_on_otherwise_ends_with_an_error(
    ours: Callable[..., Ours], two: list[Upstream], second: str
) -> None:
    events = ours(*peers(two, "Hel", second)).client.events("/v1/chat/completions", GREEDY)
    assert "".join(event["choices"][0]["delta"]["content"] for event in events[:-1]) == "Hel"
    assert events[-1]["error"]["code"] == "upstream_lost"
    assert "otherwise" in events[-1]["error"]["message"]


@pytest.mark.parametrize(
    "request_",
    [CHAT, {**CHAT, "temperature": 0.7}, {**GREEDY, "n": 2}, {**CHAT, "temperature": False}, {**CHAT, "seed": None}],
)
def test_what_is_not_determined_ends_with_an_error(
    ours: Callable[..., Ours], two: list[Upstream], request_: dict[str, Any]
) -> None:
    events = ours(*peers(two, "Hel", "Hello")).client.events("/v1/chat/completions", request_)
    assert events[-1]["error"]["code"] == "upstream_lost"
    assert two[1].asked() == 0


def test_other_servers_than_vramancers_promise_nothing(ours: Callable[..., Ours], two: list[Upstream]) -> None:
    entries = peers(two, "Hel", "Hello")
    two[0].owner = "vllm"
    assert "error" in ours(*entries).client.events("/v1/chat/completions", GREEDY)[-1]
    assert two[1].asked() == 0


def test_a_call_of_a_tool_is_not_told_twice(ours: Callable[..., Ours], two: list[Upstream]) -> None:
    def calling(talk: Talk) -> None:
        talk.open_stream()
        talk.event({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "a"}]}}]})
        talk.die()

    entries = peers(two, "", "Hello")
    two[0].behave = calling
    assert "error" in ours(*entries).client.events("/v1/chat/completions", GREEDY)[-1]
    assert two[1].asked() == 0
