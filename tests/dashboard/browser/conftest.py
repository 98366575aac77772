"""Fixtures of the browser's tests: Chromium, a server, and pages that have signed in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from served_demo import Demo
from watching import Open, Watched

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"desktop": (1440, 900), "tablet": (1024, 768), "phone": (390, 844)}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """The browser starts and ends processes as it likes; all of them end with it."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt install chromium")
    started = Demo(tmp_path_factory.mktemp("demo"))
    try:
        started.wait()
        yield started
    finally:
        started.stop()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Open]:
    """Opens pages of a size and a colour scheme; none may have complained by the end, but of what `allowed` says."""
    opened: list[tuple[Any, Watched]] = []

    def opening(demo: Demo, size: str = "desktop", scheme: str = "dark", **options: Any) -> Watched:
        width, height = SIZES[size]
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=size == "phone", **options
        )
        watched = Watched(context.new_page(), demo.url)
        opened.append((context, watched))
        return watched

    yield opening
    for context, watched in opened:
        context.close()
        assert watched.complaints == []


@pytest.fixture(params=["desktop", "phone"])
def watched(request: pytest.FixtureRequest, open_page: Open, demo: Demo) -> Watched:
    """Signed in, at desktop and at phone width."""
    page = open_page(demo, request.param)
    page.sign_in()
    return page
