"""The rate limit on real routes: keys, strangers, wrong tokens, probes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from api_client import TOKEN, ApiClient, openai_error
from fake_pipeline import FakePipeline
from flask import Flask

from core.api import create_app
from core.security.access import WRONG_TOKENS_PER_MINUTE

BODY = {"prompt": "a"}
FEW = 12

MakePipeline = Callable[..., FakePipeline]


@pytest.fixture
def limited(make_pipeline: MakePipeline) -> Flask:
    return create_app(make_pipeline(security__requests_per_minute=FEW))  # type: ignore[arg-type]


def test_a_key_gets_its_requests_and_then_a_time_to_come_back(limited: Flask) -> None:
    client = ApiClient(limited)
    for _ in range(FEW):
        assert client.post("/tokenize", BODY).status_code == 200
    for path in ("/tokenize", "/v1/completions"):
        response = client.post(path, BODY)
        assert response.status_code == 429
        error = openai_error(response)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert f"{FEW} requests a minute" in error["message"]
        assert 1 <= int(response.headers["Retry-After"]) <= 60 / FEW
    other = ApiClient(limited)
    other.raw.environ_base["REMOTE_ADDR"] = "10.0.0.9"
    assert other.post("/tokenize", BODY).status_code == 429, "it is the key that counts"


def test_probes_and_scrapes_are_never_limited(limited: Flask) -> None:
    client, stranger = ApiClient(limited), limited.test_client()
    for _ in range(3 * FEW):
        assert client.get("/metrics").status_code == 200
        assert client.get("/health").status_code == 200
        for path in ("/live", "/ready", "/health"):
            assert stranger.get(path).status_code == 200
        assert stranger.get("/metrics").status_code == 401
    assert client.post("/tokenize", BODY).status_code == 200


def test_wrong_tokens_are_slowed_down_and_the_right_one_is_not(app: Flask) -> None:
    stranger = app.test_client()
    wrong = {"X-API-TOKEN": "guess"}
    for _ in range(WRONG_TOKENS_PER_MINUTE):
        assert stranger.get("/v1/models", headers=wrong).status_code == 401
    for path in ("/v1/models", "/nowhere", "/health"):
        refused = stranger.get(path, headers=wrong)
        assert refused.status_code == 429, path
        assert int(refused.headers["Retry-After"]) >= 1
    assert stranger.get("/v1/models", headers={"X-API-TOKEN": TOKEN}).status_code == 200, "at once"
    assert stranger.get("/v1/models").status_code == 401, "no token is no guess"
    elsewhere = stranger.get("/v1/models", headers=wrong, environ_overrides={"REMOTE_ADDR": "10.0.0.7"})
    assert elsewhere.status_code == 401


def test_public_routes_are_no_way_to_guess_more(app: Flask) -> None:
    stranger = app.test_client()
    answers = [stranger.get("/health", headers={"X-API-TOKEN": f"guess {n}"}).status_code for n in range(40)]
    assert answers == [200] * WRONG_TOKENS_PER_MINUTE + [429] * (40 - WRONG_TOKENS_PER_MINUTE)


def test_strangers_without_a_token_are_limited_by_address(limited: Flask) -> None:
    stranger = limited.test_client()
    answers = [stranger.get("/v1/models").status_code for _ in range(FEW + 3)]
    assert answers == [401] * FEW + [429] * 3
    assert stranger.get("/v1/models", environ_overrides={"REMOTE_ADDR": "10.0.0.7"}).status_code == 401
    assert ApiClient(limited).post("/tokenize", BODY).status_code == 200


def test_the_setting_switches_all_of_it_off(make_pipeline: MakePipeline) -> None:
    app = create_app(make_pipeline(security__requests_per_minute=1, security__disable_rate_limit=True))  # type: ignore[arg-type]
    client, stranger = ApiClient(app), app.test_client()
    for _ in range(WRONG_TOKENS_PER_MINUTE + 5):
        assert client.post("/tokenize", BODY).status_code == 200
        assert stranger.get("/v1/models", headers={"X-API-TOKEN": "guess"}).status_code == 401
