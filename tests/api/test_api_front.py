"""`/`: a page for browsers, JSON for others; neither says anything of the server beside its name and version."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from api_client import TOKEN, ApiClient
from fake_pipeline import FakePipeline
from flask import Blueprint, Flask

from core.api import BLUEPRINTS, create_app
from core.security.access import policy, policy_of

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


class Page(HTMLParser):
    """Tags, addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name == "href"]
        self.sources += [value or "" for name, value in attrs if name in ("src", "style") or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def browse(app: Flask, **headers: str) -> tuple[Page, dict[str, str]]:
    response = app.test_client().get("/", headers={"Accept": BROWSER, **headers})
    assert response.status_code == 200
    assert response.mimetype == "text/html"
    return Page(response.text), dict(response.headers)


def test_a_browser_gets_a_page_without_a_token(app: Flask) -> None:
    page, headers = browse(app)
    assert "curl http://localhost/v1/chat/completions" in page.text
    assert "Authorization: Bearer $VRM_API_TOKEN" in page.text
    assert {"/health", "/ready", "/metrics", "/v1/models"} <= set(page.links)
    assert headers["X-Request-ID"]


def test_what_the_page_leads_to_is_there_and_says_if_it_needs_the_token(app: Flask) -> None:
    page, _ = browse(app)
    endpoints = {rule.rule: rule.endpoint for rule in app.url_map.iter_rules()}
    assert set(page.links) <= set(endpoints), "a link that leads nowhere"
    for path in page.links:
        declared = policy_of(app.view_functions[endpoints[path]])
        said = re.search(rf"{re.escape(path)}[^/]*", page.text)
        assert declared is not None and said is not None
        assert ("needs the token" in said[0]) is (declared.role is not None), path


def test_a_place_appears_with_its_route(pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch, app: Flask) -> None:
    assert "/dashboard" not in browse(app)[0].links
    later = Blueprint("later", __name__)
    later.get("/dashboard")(policy(public=True)(lambda: ""))
    monkeypatch.setattr("core.api.BLUEPRINTS", (*BLUEPRINTS, later))
    assert "/dashboard" in browse(create_app(pipeline))[0].links  # type: ignore[arg-type]


def test_the_page_runs_and_loads_nothing(app: Flask) -> None:
    page, headers = browse(app)
    assert not {"script", "link", "img", "iframe", "form", "base"} & set(page.tags)
    assert page.sources == []
    rules = dict(rule.strip().split(" ", 1) for rule in headers["Content-Security-Policy"].split(";"))
    assert rules.pop("style-src").startswith("'nonce-")
    assert rules == dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


def test_the_style_has_the_nonce_of_this_answer(app: Flask) -> None:
    nonces = set()
    for _ in range(2):
        response = app.test_client().get("/", headers={"Accept": BROWSER})
        nonce = re.search(r"'nonce-([\w-]+)'", response.headers["Content-Security-Policy"])
        assert nonce is not None and f'<style nonce="{nonce[1]}">' in response.text
        nonces.add(nonce[1])
    assert len(nonces) == 2


@pytest.mark.parametrize("accept", ["", "*/*", "application/json", "application/json, text/html", "text/plain"])
def test_others_get_json(app: Flask, accept: str) -> None:
    response = app.test_client().get("/", headers={"Accept": accept})
    assert response.status_code == 200
    body = response.get_json()
    assert body["name"] == "VRAMancer"
    assert "/health" in body["places"]
    assert "Accept" in response.headers["Vary"], "a cache must not give one for the other"


def test_the_page_says_no_more_than_name_and_version(make_pipeline: Callable[..., FakePipeline]) -> None:
    pipeline = make_pipeline()
    app = create_app(pipeline, version="9.8.7")  # type: ignore[arg-type]
    page, _ = browse(app)
    with_token = ApiClient(app).get("/", headers={"Accept": BROWSER})
    assert "VRAMancer 9.8.7" in page.text
    assert app.test_client().get("/").get_json()["version"] == "9.8.7"
    assert Page(with_token.text).text == page.text
    for secret in (TOKEN, pipeline.model.name, "cpu"):
        assert secret not in page.text


def test_the_host_is_escaped(app: Flask) -> None:
    response = app.test_client().get("/", headers={"Accept": BROWSER, "Host": 'a"><script>x</script>'})
    assert "<script" not in response.text
