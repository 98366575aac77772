"""axe finds nothing serious on any page, dark or light, wide or narrow."""

from __future__ import annotations

import re

import pytest
from served_demo import Demo
from watching import Open, Watched

axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
PAGES = ("Overview", "Memory", "Pipeline", "Requests", "Cluster", "Models", "Chat")


def faults(watched: Watched) -> list[str]:
    found = axe_api.Axe().run(watched.page).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes'][:3]]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_axe_finds_nothing_serious(open_page: Open, demo: Demo, size: str, scheme: str) -> None:
    demo.fill_tiers()
    watched = open_page(demo, size, scheme, bypass_csp=True, reduced_motion="reduce")
    watched.page.goto(f"{demo.url}/dashboard")
    assert faults(watched) == [], "signing in"
    watched.sign_in()
    with demo.busy():
        for name in PAGES:
            watched.go(name)
            if name == "Memory":
                watched.page.get_by_role("group", name=re.compile("Hottest")).first.get_by_role("button").first.click()
            if name == "Pipeline":
                watched.page.get_by_role("button", name="Try it").click()
                watched.expect(watched.page.get_by_role("heading", name="What it would bring")).to_be_visible()
            if name == "Models":
                watched.expect(".model").to_be_attached()
            if name == "Chat":
                watched.page.get_by_role("button", name="What does VRAMancer do?").click()
                watched.expect(watched.page.get_by_role("button", name="Regenerate answer")).to_be_enabled()
            assert faults(watched) == [], name
    watched.go("Models")
    watched.page.get_by_role("button", name="Unload").click()
    watched.expect(watched.page.get_by_role("dialog")).to_be_visible()
    assert faults(watched) == [], "a question"
