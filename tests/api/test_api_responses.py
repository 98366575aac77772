"""OpenAI's Responses API: events in their order, what is kept and for whom, conversations that go on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_client import TOKEN, ApiClient, openai_error
from fake_pipeline import CONTEXT, FakePipeline
from flask import Flask
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from core.api import create_app
from core.api.responses import routes
from core.api.responses.store import ResponseStore, Stored
from core.errors import NotFoundError, StepFailedError
from core.request import RequestOutput, SequenceDelta

URL = "/v1/responses"
WEATHER = {
    "type": "function", "name": "weather", "description": "Says what the weather is.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}  # fmt: skip
BODY: dict[str, Any] = {"model": "demo", "input": "a"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
EVERYTHING = f"<think>hm</think>\n\nLet me see.\n{CALL}\n{CALL}"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


Shown = list[tuple[list[dict[str, Any]], dict[str, Any]]]


@pytest.fixture
def shown(thinker: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> Shown:
    """The messages and the options that the template was given."""
    seen: Shown = []

    def encode_chat(messages: list[dict[str, Any]], **options: Any) -> list[int]:
        seen.append((messages, options))
        return [97] * sum(len(message["content"] or "") for message in messages)

    monkeypatch.setattr(thinker.model.tokenizer, "encode_chat", encode_chat)
    return seen


def events(client: ApiClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    """A stream's events, which openai's types take, numbered and named by their type."""
    response = client.post(URL, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.mimetype == "text/event-stream"
    found = []
    for number, text in enumerate(response.text.split("\n\n")[:-1]):
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENT.validate_python(event, strict=True)
        found.append(event)
    response.close()
    return found


def types(found: list[dict[str, Any]]) -> list[str]:
    """Their types, deltas of a kind in a row once."""
    names = [event["type"].removeprefix("response.") for event in found]
    return [name for name, before in zip(names, ["", *names], strict=False) if name != before]


# ---- answers -----------------------------------------------------------------------------------------------------


def test_a_response_is_a_message(client: ApiClient) -> None:
    answer = client.post(URL, BODY | {"metadata": {"a": "b"}, "temperature": 0.5}).get_json()
    OpenAIResponse.model_validate(answer, strict=True)
    (item,) = answer["output"]
    assert (answer["object"], answer["status"], item["type"], item["role"]) == (
        "response", "completed", "message", "assistant",
    )  # fmt: skip
    assert item["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert answer["usage"]["input_tokens_details"]["cached_tokens"] == 1
    assert (answer["usage"]["output_tokens"], answer["usage"]["total_tokens"]) == (5, 12)
    assert (answer["metadata"], answer["temperature"], answer["store"]) == ({"a": "b"}, 0.5, True)


MESSAGE = [
    "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
    "output_item.done",
]  # fmt: skip
THOUGHTS = [name.replace("output_text", "reasoning_text") for name in MESSAGE]
CALLED = [
    "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
]  # fmt: skip


def test_events_come_in_their_order(client: ApiClient) -> None:
    found = events(client, BODY)
    assert types(found) == ["created", "in_progress", *MESSAGE, "completed"]
    assert "".join(event.get("delta", "") for event in found) == "Hello"
    assert found[0]["response"]["status"] == "in_progress"
    assert found[0]["response"]["id"] == found[-1]["response"]["id"]
    assert found[2]["item"]["content"] == []
    assert found[-1]["response"]["output"] == [found[-2]["item"]]
    assert found[-1]["response"]["usage"]["output_tokens"] == 5


def test_thoughts_text_and_calls_are_items(client: ApiClient, thinker: FakePipeline) -> None:
    thinker.reply = EVERYTHING
    body = BODY | {"tools": [WEATHER, {"type": "web_search"}]}
    found = events(client, body)
    assert types(found) == ["created", "in_progress", *THOUGHTS, *MESSAGE, *CALLED, *CALLED, "completed"]
    whole = client.post(URL, body).get_json()
    OpenAIResponse.model_validate(whole, strict=True)
    for output in (found[-1]["response"]["output"], whole["output"]):
        thoughts, message, call, other = output
        assert thoughts["content"] == [{"type": "reasoning_text", "text": "hm"}]
        assert message["content"][0]["text"].strip() == "Let me see."
        assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Oslo"})
        assert len({item["id"] for item in output} | {call["call_id"], other["call_id"]}) == 6
        assert {item["status"] for item in output} == {"completed"}
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == 2
    places = {event["output_index"] for event in found if "output_index" in event}
    assert places == {0, 1, 2, 3}


def test_what_is_cut_off_is_incomplete(client: ApiClient) -> None:
    body = BODY | {"max_output_tokens": 3}
    found = events(client, body)
    assert types(found)[-1] == "incomplete"
    for answer in (found[-1]["response"], client.post(URL, body).get_json()):
        assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert (answer["output"][0]["status"], answer["output"][0]["content"][0]["text"]) == ("incomplete", "Hel")


def test_log_probabilities_belong_to_text(client: ApiClient, thinker: FakePipeline) -> None:
    thinker.reply = "<think>hm</think>Hello"
    body = BODY | {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    found = events(client, body)
    streamed = [entry["token"] for event in found for entry in event.get("logprobs", ()) if "delta" in event]
    assert "".join(streamed) == "Hello"
    (part,) = found[-1]["response"]["output"][1]["content"]
    assert [entry["token"] for entry in part["logprobs"]] == list("Hello")
    assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {2}


def test_a_stream_that_fails_says_so_and_is_kept(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.failing = {0: StepFailedError("The step failed.")}
    found = events(client, BODY)
    assert found[-1]["type"] == "response.failed"
    kept = client.get(f"{URL}/{found[0]['response']['id']}").get_json()
    assert (kept["status"], kept["error"]["message"]) == ("failed", "The step failed.")
    pipeline.tokens_before_error = 0
    assert types(events(client, BODY)) == ["error"], "nothing had begun"


# ---- what is kept ------------------------------------------------------------------------------------------------


def test_a_response_is_kept_until_it_is_deleted(client: ApiClient) -> None:
    for answer in (client.post(URL, BODY).get_json(), events(client, BODY)[-1]["response"]):
        path = f"{URL}/{answer['id']}"
        assert client.get(path).get_json() == answer
        items = client.get(f"{path}/input_items").get_json()
        assert items["data"][0]["content"] == [{"type": "input_text", "text": "a"}]
        assert client.delete(path).get_json() == {"id": answer["id"], "object": "response", "deleted": True}
        for gone in (client.get(path), client.delete(path), client.get(f"{path}/input_items")):
            assert gone.status_code == 404
            assert "1000 responses" in openai_error(gone)["message"]


def test_what_is_not_stored_is_not_kept(client: ApiClient, app: Flask) -> None:
    answer = client.post(URL, BODY | {"store": False}).get_json()
    events(client, BODY | {"store": False})
    assert answer["store"] is False
    assert client.get(f"{URL}/{answer['id']}").status_code == 404
    assert len(app.extensions[routes.STORE]) == 0


def test_input_items_come_page_by_page(client: ApiClient) -> None:
    given = [{"role": "user", "content": str(number)} for number in range(5)]
    path = f"{URL}/{client.post(URL, BODY | {'input': given}).get_json()['id']}/input_items"
    first = client.get(f"{path}?limit=2&order=asc").get_json()
    assert [item["content"][0]["text"] for item in first["data"]] == ["0", "1"]
    assert (first["has_more"], first["last_id"]) == (True, first["data"][1]["id"])
    rest = client.get(f"{path}?order=asc&after={first['last_id']}").get_json()
    assert ([item["content"][0]["text"] for item in rest["data"]], rest["has_more"]) == (["2", "3", "4"], False)
    assert client.get(path).get_json()["data"][0]["content"][0]["text"] == "4"
    for query, param in (("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=x", "after")):
        refused = client.get(f"{path}?{query}")
        assert refused.status_code == 400
        assert openai_error(refused)["param"] == param
    assert client.get(f"{URL}/{'resp_x'}?stream=true").status_code == 400


def test_a_conversation_goes_on(client: ApiClient, shown: Shown, thinker: FakePipeline) -> None:
    thinker.reply = EVERYTHING
    first = client.post(URL, BODY | {"instructions": "Be brief.", "tools": [WEATHER]}).get_json()
    calls = [item for item in first["output"] if item["type"] == "function_call"]
    results = [{"type": "function_call_output", "call_id": call["call_id"], "output": "rain"} for call in calls]
    thinker.reply = "It rains."
    second = client.post(URL, BODY | {"input": results, "previous_response_id": first["id"]}).get_json()
    third = client.post(URL, BODY | {"input": "And now?", "previous_response_id": second["id"]}).get_json()
    assert third["previous_response_id"] == second["id"]
    given = shown[-1][0]
    assert [message["role"] for message in given] == ["user", "assistant", "tool", "tool", "assistant", "user"]
    assert given[1]["reasoning_content"] == "hm"
    assert given[1]["content"].strip() == "Let me see."
    assert [call["function"]["arguments"] for call in given[1]["tool_calls"]] == [{"city": "Oslo"}] * 2
    assert [call["id"] for call in given[1]["tool_calls"]] == [message["tool_call_id"] for message in given[2:4]]
    assert shown[0][0][0] == {"role": "system", "content": "Be brief."}, "and instructions do not go on"
    stateless = [{"role": "user", "content": "a"}, *first["output"], *results, *second["output"],
                 {"role": "user", "content": "And now?"}]  # fmt: skip
    client.post(URL, BODY | {"input": stateless, "store": False})
    assert shown[-1][0] == given, "sent by the client it is the same"
    referred = [{"role": "user", "content": "a"}, *({"type": "item_reference", "id": i["id"]} for i in first["output"])]
    client.post(URL, BODY | {"input": [*referred, *results, *second["output"], stateless[-1]]})
    assert shown[-1][0] == given


def test_a_conversation_goes_on_without_input(client: ApiClient, shown: Shown) -> None:
    first = client.post(URL, {"input": "a", "instructions": "Be brief."}).get_json()
    again = client.post(URL, {"previous_response_id": first["id"]})
    assert again.status_code == 200
    assert [message["role"] for message in shown[-1][0]] == ["user", "assistant"]
    assert client.error(URL, {}, status=400)["param"] == "input"


def test_who_asks_is_shown_if_told(client: ApiClient) -> None:
    assert client.post(URL, BODY | {"user": "me"}).get_json()["user"] == "me"
    assert "user" not in client.post(URL, BODY).get_json(), "OpenAI's specification has no null there"


@pytest.mark.parametrize("tier", ["auto", "default", "fast", "flex", "priority", "scale"])
def test_whatever_is_paid_for_all_are_served_alike(client: ApiClient, tier: str) -> None:
    assert client.post(URL, BODY | {"service_tier": tier}).get_json()["service_tier"] == "default"


def test_an_item_is_referred_to_once(client: ApiClient) -> None:
    item = {"type": "item_reference", "id": client.post(URL, BODY).get_json()["output"][0]["id"]}
    question = {"role": "user", "content": "a"}
    assert client.post(URL, BODY | {"input": [item, question]}).status_code == 200
    error = client.error(URL, BODY | {"input": [item, question, item]}, status=400)
    assert (error["param"], "twice" in error["message"]) == ("input[2].id", True)


def test_a_conversation_that_is_gone_is_not_guessed(client: ApiClient) -> None:
    first = client.post(URL, BODY).get_json()
    second = client.post(URL, BODY | {"previous_response_id": first["id"]}).get_json()
    client.delete(f"{URL}/{first['id']}")
    for name in (first["id"], second["id"], "resp_unheard-of"):
        error = client.error(URL, BODY | {"previous_response_id": name}, status=400)
        assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")


def test_the_system_is_told_once_at_the_beginning(client: ApiClient, shown: Shown) -> None:
    given = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
    ]  # fmt: skip
    client.post(URL, BODY | {"instructions": "Be brief.", "input": given})
    assert shown[0][0] == [{"role": "system", "content": "Be brief.\n\nBe kind."}, {"role": "user", "content": "a"}]


def test_truncation_leaves_out_the_oldest_turns(client: ApiClient, shown: Shown) -> None:
    turns = [
        {"role": role, "content": f"{number}" + role * 30} for number in range(9) for role in ("user", "assistant")
    ]
    body = BODY | {"input": [*turns, {"role": "user", "content": "a"}], "instructions": "Be brief."}
    assert client.error(URL, body, status=400)["code"] == "context_length_exceeded"
    assert client.post(URL, body | {"truncation": "auto", "max_output_tokens": 20}).status_code == 200
    given = shown[-1][0]
    length = sum(len(message["content"]) for message in given)
    assert (given[0]["content"], given[1]["role"], given[-1]["content"]) == ("Be brief.", "user", "a")
    assert CONTEXT - 20 - 391 <= length <= CONTEXT - 20, "no more than needed"
    long = BODY | {"input": "a" * CONTEXT, "truncation": "auto"}
    assert client.error(URL, long, status=400)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("ends", ["cancelled", "left", "deleted"])
def test_a_response_that_runs_can_be_cancelled(
    client: ApiClient, pipeline: FakePipeline, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = pipeline.submit_many

    def begin(*given: Any, **options: Any) -> Any:
        (handle,) = submit(*given, **options)
        handle.put(RequestOutput(handle.request_id, (SequenceDelta(0, "He", (72, 101)),), 7))
        return [handle]

    pipeline.hold = True
    monkeypatch.setattr(pipeline, "submit_many", begin)
    response = client.post(URL, BODY | {"stream": True}, buffered=False)
    (name,) = pipeline.running
    stream = response.iter_encoded()
    created = json.loads(next(stream).decode().split("data: ")[1])
    path = f"{URL}/{created['response']['id']}"
    assert client.get(path).get_json()["status"] == "in_progress"
    if ends == "deleted":
        client.delete(path)
        response.close()
        assert client.get(path).status_code == 404, "it does not come back"
        return
    if ends == "left":
        response.close()
        assert pipeline.aborted == [name]
    else:
        assert client.post(f"{path}/cancel").get_json()["status"] == "cancelled"
        last = json.loads(b"".join(stream).decode().split("data: ")[-1])
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
        assert last["response"]["output"][0]["content"][0]["text"] == "He"
    assert client.get(path).get_json()["status"] == "cancelled"
    assert openai_error(client.post(f"{path}/cancel"))["param"] == "response_id"


def test_keys_see_their_own_responses_alone() -> None:
    store = ResponseStore()
    store.put("a", stored("r1"))
    assert store.get("a", "r1").response["id"] == "r1"
    for call in (store.get, store.delete, store.conversation):
        with pytest.raises(NotFoundError):
            call("b", "r1")
    assert "i-r1" not in store.items("b")
    assert store.items("a")["i-r1"] == {"id": "i-r1", "text": ""}


def stored(name: str, previous: str | None = None, text: str = "") -> Stored:
    return Stored({"id": name, "previous_response_id": previous, "output": []}, [{"id": f"i-{name}", "text": text}])


def test_the_store_is_bounded_in_number_and_bytes() -> None:
    store = ResponseStore(max_responses=3, max_bytes=5000, max_total_bytes=8000)
    for name in "abc":
        store.put("x", stored(name))
    store.get("x", "a")
    store.put("x", stored("d"))
    assert [name for name in "abcd" if kept(store, "x", name)] == ["a", "c", "d"], "what was not used for longest goes"
    store.put("x", stored("e", text="x" * 4850))
    assert [name for name in "acde" if kept(store, "x", name)] == ["e"]
    store.put("x", stored("f", text="x" * 9000))
    assert not kept(store, "x", "f") and len(store) == 0, "what is too large is not kept"
    store.put("x", stored("g", text="x" * 4000))
    store.put("y", stored("h", text="x" * 3500))
    store.put("z", stored("i", text="x" * 3500))
    assert [kept(store, *pair) for pair in (("x", "g"), ("y", "h"), ("z", "i"))] == [False, True, True]


def kept(store: ResponseStore, owner: str, name: str) -> bool:
    try:
        store.get(owner, name)
    except NotFoundError:
        return False
    return True


def test_a_response_that_was_deleted_does_not_come_back() -> None:
    store = ResponseStore()
    store.put("x", stored("a"))
    store.delete("x", "a")
    store.replace("x", stored("a"))
    assert len(store) == 0


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "computer_call_output"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
        ({"background": True, "stream": True}, "stream"),
        ({"background": True, "store": False}, "store"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": CONTEXT}, "max_output_tokens"),
        ({"input": "a" * CONTEXT}, "input"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"include": ["everything"]}, "include[0]"),
        ({"metadata": {"a" * 65: "b"}}, None),
        ({"metadata": {str(number): "b" for number in range(17)}}, "metadata"),
        ({"temperature": 3}, "temperature"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_wrong_is_named_as_the_client_does(
    client: ApiClient, thinker: FakePipeline, extra: dict[str, Any], param: str | None
) -> None:
    error = client.error(URL, BODY | extra, status=400)
    if param is not None:
        assert error["param"] == param
    assert not thinker.submitted


def test_text_is_a_format(client: ApiClient) -> None:
    extra = {"text": {"format": {"type": "text"}}, "tool_choice": "auto", "background": False, "truncation": "disabled"}
    assert client.post(URL, BODY | extra).status_code == 200


def test_read_only_mode_answers_and_deletes_nothing(make_pipeline: Any) -> None:
    client = ApiClient(create_app(make_pipeline(security__read_only=True)))
    answer = client.post(URL, BODY).get_json()
    assert client.delete(f"{URL}/{answer['id']}").status_code == 403
    assert client.raw.get(f"{URL}/{answer['id']}").status_code == 401
    assert client.raw.get(f"{URL}/{answer['id']}", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [{**WEATHER, "strict": True}]},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}}},
        {"text": {"format": {"type": "json_object"}}},
    ],
)
def test_calls_that_must_be_and_forms_are_kept_to(
    client: ApiClient, thinker: FakePipeline, asked: dict[str, Any]
) -> None:
    assert client.post(URL, BODY | asked).status_code == 200
    assert thinker.submitted[-1][1].grammar is not None
