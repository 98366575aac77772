"""A page in a browser, what it complained of, and looking at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from served_demo import TOKEN
from steering import LONGEST_WAIT_S


class Watched:
    """`complaints` are errors and warnings of its console."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        page.set_default_timeout(LONGEST_WAIT_S * 1000)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._hear)

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def expect(self, target: Any) -> Any:
        from playwright.sync_api import expect

        expect.set_options(timeout=LONGEST_WAIT_S * 1000)
        return expect(self.page.locator(target) if isinstance(target, str) else target)

    def sign_in(self, token: str = TOKEN) -> None:
        self.page.goto(f"{self.url}/dashboard")
        self.page.get_by_label("API token").fill(token)
        self.page.get_by_role("button", name="Sign in").click()
        self.expect(".connection.live").to_be_attached()

    def go(self, name: str) -> None:
        """To one of the pages, by its link."""
        self.page.get_by_role("navigation", name="Pages").get_by_role("link", name=name).click()
        self.expect(self.page.get_by_role("main")).to_have_attribute("data-page", name.lower())

    def confirm(self, action: str) -> None:
        self.page.get_by_role("dialog").get_by_role("button", name=action).click()

    def notice(self, text: str) -> None:
        self.expect(self.page.locator(".notices").get_by_text(text)).to_be_visible()


Open = Callable[..., Watched]
