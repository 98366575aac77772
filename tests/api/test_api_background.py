"""Responses in the background: made while nobody waits, asked for later, cancelled, bounded, for their owner alone."""

from __future__ import annotations

from typing import Any

import pytest
from api_client import TOKEN, ApiClient, openai_error
from fake_pipeline import FakePipeline
from flask import Flask
from openai.types.responses import Response as OpenAIResponse
from steering import until

from core.api.responses import routes
from core.api.responses.background import BackgroundResponses
from core.api.translated import AnswerPieces
from core.batching.output import RequestHandle
from core.errors import QueueFullError, StepFailedError
from core.request import RequestOutput, SequenceDelta

URL = "/v1/responses"
BODY: dict[str, Any] = {"model": "demo", "input": "a", "background": True}


@pytest.fixture
def background(app: Flask) -> BackgroundResponses:
    found: BackgroundResponses = app.extensions[routes.BACKGROUND]
    return found


def begin(client: ApiClient) -> dict[str, Any]:
    answer: dict[str, Any] = client.post(URL, BODY).get_json()
    OpenAIResponse.model_validate(answer, strict=True)
    assert (answer["status"], answer["background"], answer["output"]) == ("queued", True, [])
    return answer


def look(client: ApiClient, answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"{URL}/{answer['id']}").get_json()
    OpenAIResponse.model_validate(found, strict=True)
    return found


def ended(client: ApiClient, answer: dict[str, Any], background: BackgroundResponses) -> dict[str, Any]:
    until(lambda: len(background) == 0, "the response ends")
    return look(client, answer)


def feed(handle: RequestHandle, *, last: bool) -> None:
    reason: Any = "stop" if last else None
    delta = SequenceDelta(0, "He", (72, 101), finish_reason=reason)
    handle.put(RequestOutput(handle.request_id, (delta,), 7, finished=last))


def test_it_is_queued_then_in_progress_then_complete(
    client: ApiClient, pipeline: FakePipeline, background: BackgroundResponses
) -> None:
    pipeline.hold = True
    answer = begin(client)
    assert look(client, answer)["status"] == "queued"
    (handle,) = pipeline.running.values()
    feed(handle, last=False)
    until(lambda: look(client, answer)["status"] == "in_progress", "it is in progress")
    error = client.error(URL, {"input": "b", "previous_response_id": answer["id"]}, status=400)
    assert (error["param"], "not complete yet" in error["message"]) == ("previous_response_id", True)
    feed(handle, last=True)
    found = ended(client, answer, background)
    assert (found["status"], found["output"][0]["content"][0]["text"]) == ("completed", "HeHe")
    assert found["usage"]["output_tokens"] == 4
    pipeline.hold = False
    later = client.post(URL, {"input": "b", "previous_response_id": answer["id"]})
    assert later.status_code == 200
    assert not pipeline.aborted, "nobody left"


def test_cancelling_keeps_what_there_is(
    client: ApiClient, pipeline: FakePipeline, background: BackgroundResponses
) -> None:
    pipeline.hold = True
    answer = begin(client)
    (handle,) = pipeline.running.values()
    feed(handle, last=False)
    path = f"{URL}/{answer['id']}/cancel"
    assert client.post(path).get_json()["status"] == "cancelled"
    found = ended(client, answer, background)
    assert (found["status"], found["output"][0]["content"][0]["text"]) == ("cancelled", "He")
    assert client.post(path).get_json() == found, "once more changes nothing"


def test_one_that_is_complete_cannot_be_cancelled(client: ApiClient, background: BackgroundResponses) -> None:
    answer = begin(client)
    assert ended(client, answer, background)["status"] == "completed"
    assert openai_error(client.post(f"{URL}/{answer['id']}/cancel"))["param"] == "response_id"


def test_deleting_ends_it(client: ApiClient, pipeline: FakePipeline, background: BackgroundResponses) -> None:
    pipeline.hold = True
    answer = begin(client)
    client.delete(f"{URL}/{answer['id']}")
    until(lambda: len(background) == 0, "the response ends")
    assert not pipeline.running
    assert client.get(f"{URL}/{answer['id']}").status_code == 404


@pytest.mark.parametrize("tokens", [0, 2], ids=["before the first token", "after two"])
def test_one_that_fails_says_so(
    client: ApiClient, pipeline: FakePipeline, background: BackgroundResponses, tokens: int
) -> None:
    pipeline.failing, pipeline.tokens_before_error = {0: StepFailedError("The step failed.")}, tokens
    found = ended(client, begin(client), background)
    assert (found["status"], found["error"]["message"]) == ("failed", "The step failed.")


def test_a_bug_ends_it_too(client: ApiClient, background: BackgroundResponses, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(AnswerPieces, "feed", broken)
    found = ended(client, begin(client), background)
    assert (found["status"], found["error"]["code"]) == ("failed", "server_error")


def test_they_are_bounded(app: Flask, client: ApiClient, pipeline: FakePipeline) -> None:
    app.extensions[routes.BACKGROUND] = background = BackgroundResponses(max_of_a_key=1)
    pipeline.hold = True
    answer = begin(client)
    refused = client.post(URL, BODY)
    assert (refused.status_code, openai_error(refused)["code"]) == (429, "queue_full")
    assert len(pipeline.submitted) == 1, "nothing was begun for it"
    client.post(f"{URL}/{answer['id']}/cancel")
    until(lambda: len(background) == 0, "the response ends")
    pipeline.hold = False
    assert ended(client, begin(client), background)["status"] == "completed"


def test_places_are_of_a_key_and_of_all() -> None:
    background = BackgroundResponses(max_of_a_key=1, max_running=2)
    with background.place("a"), background.place("b"):
        for owner in ("a", "c"):
            with pytest.raises(QueueFullError), background.place(owner):
                pass
        assert len(background) == 2
    assert len(background) == 0, "what was not begun is given back"


def test_what_the_engine_refuses_takes_no_place(client: ApiClient, background: BackgroundResponses) -> None:
    assert client.error(URL, BODY | {"max_output_tokens": 10**6}, status=400)["param"] == "max_output_tokens"
    assert len(background) == 0


def test_strangers_do_not_see_it(client: ApiClient, background: BackgroundResponses) -> None:
    answer = begin(client)
    ended(client, answer, background)
    assert client.raw.get(f"{URL}/{answer['id']}").status_code == 401
    assert client.raw.post(f"{URL}/{answer['id']}/cancel").status_code == 401
    assert client.raw.get(f"{URL}/{answer['id']}", headers={"X-API-TOKEN": TOKEN}).status_code == 200
