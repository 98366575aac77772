"""The dashboard as people use it: a real browser, a real server."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from served_demo import TOKEN, Demo
from steering import until
from watching import Open, Watched

PAGES = ("Overview", "Memory", "Pipeline", "Requests", "Cluster", "Models", "Chat")


def test_the_token_signs_in_and_nothing_else(open_page: Open, demo: Demo) -> None:
    watched = open_page(demo)
    page = watched.page
    page.goto(f"{demo.url}/dashboard")
    field = page.get_by_label("API token")
    watched.expect(field).to_be_focused()
    page.keyboard.press("Enter")
    watched.expect("#trouble").to_have_text("Enter the server's API token.")
    field.fill("wrong")
    page.keyboard.press("Enter")
    watched.expect("#trouble").to_have_text("The API token is wrong.")
    assert any("401" in complaint for complaint in watched.complaints)
    watched.complaints.clear()
    field.fill(TOKEN)
    page.keyboard.press("Enter")
    watched.expect(page.get_by_role("heading", level=1)).to_have_text("vramancer-demo")
    assert TOKEN not in page.content()
    assert page.evaluate("document.cookie") == "", "scripts do not see the session"
    assert TOKEN not in page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    page.get_by_role("button", name="Sign out").click()
    watched.expect(page.get_by_label("API token")).to_be_visible()
    page.goto(f"{demo.url}/dashboard#/memory")
    watched.expect(page.get_by_label("API token")).to_be_visible()


def test_values_change_under_load(watched: Watched, demo: Demo) -> None:
    tile = watched.page.get_by_role("region", name="Requests", exact=True).locator(".figure b")
    rate = watched.page.get_by_role("region", name="Throughput", exact=True).locator(".figure b")
    watched.expect(tile).to_have_text("0")
    with demo.busy():
        watched.expect(tile).to_have_text(re.compile("[12]"))
        watched.expect(rate).not_to_have_text("0.0")
        shown = {rate.inner_text()}
        until(lambda: shown.add(rate.inner_text()) or len(shown) > 2, "the rate moves")
        watched.go("Pipeline")
        busy = watched.page.locator(".stage .figure b").first
        watched.expect(busy).to_have_text(re.compile(r"[1-9]\d* %"))
    watched.go("Overview")
    watched.expect(tile).to_have_text("0")


def test_a_request_is_cancelled(watched: Watched, demo: Demo) -> None:
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(demo.complete("Once upon a time", 1500)))
    asking.start()
    watched.go("Requests")
    cancel = watched.page.get_by_role("button", name=re.compile("^Cancel request"))
    cancel.click()
    watched.page.get_by_role("dialog").get_by_role("button", name="Cancel", exact=True).click()
    watched.expect(cancel).to_be_enabled()
    cancel.click()
    watched.confirm("Cancel the request")
    watched.notice("was cancelled")
    asking.join()
    assert answers[0]["choices"][0]["finish_reason"] != "length"
    watched.expect(watched.page.get_by_text("Nothing runs")).to_be_visible()


def test_a_block_is_demoted_and_promoted(watched: Watched, demo: Demo) -> None:
    demo.fill_tiers()
    watched.go("Memory")
    page = watched.page
    host = page.get_by_role("group", name="Hottest blocks of Main memory")
    host.get_by_role("button").first.click()
    sheet = page.get_by_role("complementary", name="Chosen block")
    block = sheet.locator(".mono").inner_text()
    watched.expect(sheet.get_by_role("button", name="Promote")).to_be_disabled()
    sheet.get_by_role("button", name="Demote to disk").click()
    watched.notice("is demoted")

    def where() -> set[str]:
        tiers = demo.ask("/api/memory?blocks=1000")["tiers"]
        return {tier["tier"] for tier in tiers if block in [one["block"] for one in tier["hottest"]]}

    until(lambda: where() == {"L5"}, "it is on the disk alone")
    watched.expect(sheet).to_contain_text("In disk")
    sheet.get_by_role("button", name="Promote to main memory").click()
    watched.notice("is promoted")
    assert "L3" in where()
    sheet.get_by_role("button", name="Close").click()
    watched.expect(sheet).not_to_be_attached()


def layers(demo: Demo) -> list[list[int]]:
    return [stage["layers"] for stage in demo.ask("/api/pipeline/status")["stages"]]


def move(watched: Watched) -> None:
    watched.expect(watched.page.get_by_role("heading", name="What it would bring")).to_be_visible()
    watched.page.get_by_role("button", name="Move the model").click()
    watched.confirm("Move the model")
    watched.notice("The model has moved")


def test_the_model_is_cut_anew_by_dragging_and_by_typing(watched: Watched, demo: Demo) -> None:
    page = watched.page
    watched.go("Pipeline")
    cut = page.get_by_role("slider", name="Cut between cpu#0 and cpu#1")
    cut.scroll_into_view_if_needed()
    before = int(cut.get_attribute("aria-valuenow"))
    target = before + 1 if before < 5 else before - 1
    track = page.locator(".strip-track").bounding_box()
    middle = track["y"] + track["height"] / 2
    page.mouse.move(track["x"] + track["width"] * before / 6, middle)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] * target / 6, middle, steps=4)
    page.mouse.up()
    watched.expect(cut).to_have_attribute("aria-valuenow", str(target))
    assert layers(demo)[0] == [0, before - 1], "nothing happens before it is confirmed"
    move(watched)
    until(lambda: layers(demo) == [[0, target - 1], [target, 5]], "the layers have moved")

    cut.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    watched.expect(cut).to_have_attribute("aria-valuenow", "2")
    page.get_by_role("button", name="Reset").click()
    watched.expect(cut).to_have_attribute("aria-valuenow", str(target))

    fields = page.get_by_role("group", name="Layers on each device")
    typed = 2 if target != 2 else 3
    fields.get_by_label("cpu#0").fill(str(typed))
    watched.expect(page.get_by_text(f"have to add up to 6; they are {typed + 6 - target}.")).to_be_visible()
    fields.get_by_label("cpu#1").fill(str(6 - typed))
    move(watched)
    until(lambda: layers(demo) == [[0, typed - 1], [typed, 5]], "they have moved again")


def test_what_does_not_fit_is_said_in_the_server_s_words(watched: Watched) -> None:
    watched.go("Pipeline")
    watched.page.get_by_role("textbox", name="Devices").fill("cpu=1MiB,cpu=1MiB")
    watched.page.get_by_role("button", name="Try it").click()
    watched.expect(watched.page.get_by_role("alert")).to_contain_text("lacks")
    watched.expect(watched.page.get_by_role("button", name="Move the model")).to_be_disabled()
    until(lambda: watched.complaints, "the browser notes the refusal")
    assert all("400" in complaint for complaint in watched.complaints)
    watched.complaints.clear()


def test_the_model_is_swapped(watched: Watched, demo: Demo) -> None:
    page = watched.page
    watched.go("Models")
    watched.expect(page.locator(".model").get_by_text("Serving")).to_be_visible()
    page.get_by_role("textbox", name="Model").fill("/nowhere/at/all")
    page.get_by_role("button", name="Load", exact=True).click()
    watched.confirm("Load")
    watched.expect(page.locator(".alert.error")).to_contain_text("/nowhere/at/all")
    until(lambda: watched.complaints, "the browser notes the refusal")
    watched.complaints.clear()
    page.get_by_role("button", name="Dismiss").first.click()

    page.get_by_role("button", name="Unload").click()
    watched.confirm("Unload")
    watched.notice("was unloaded")
    watched.expect(page.locator(".page-head").get_by_text("No model is loaded")).to_be_visible()
    watched.go("Overview")
    watched.expect(page.get_by_text("Nothing to serve yet")).to_be_visible()
    watched.go("Models")
    page.get_by_role("button", name="Load vramancer-demo").click()
    watched.notice("vramancer-demo serves now.")
    watched.expect(page.locator(".page-head").get_by_text("vramancer-demo is served")).to_be_visible()
    assert demo.ask("/api/models")["loaded"] == "vramancer-demo"


def test_chat(watched: Watched, demo: Demo, tmp_path: Path) -> None:
    page = watched.page
    watched.go("Chat")
    question = page.get_by_role("textbox", name="Your question")
    page.get_by_text("Settings of this conversation").click()
    page.get_by_label("Temperature").fill("0")
    question.fill("What is the capital of France?")
    question.press("Enter")
    said = page.locator(".message.assistant .said")
    watched.expect(said).to_have_text("The capital of France is Paris.")
    watched.expect(page.locator(".message-foot").get_by_text("tok/s")).to_be_visible()

    page.get_by_role("button", name="Regenerate answer").click()
    watched.expect(said).to_have_text("The capital of France is Paris.")
    page.get_by_role("button", name="Edit question").click()
    page.get_by_label("Edit your question").fill("What is the capital of Italy?")
    page.get_by_role("button", name="Send again").click()
    watched.expect(said).to_contain_text("Rome")
    watched.expect(page.locator(".message.user")).to_have_count(1)

    page.reload()
    watched.expect(said).to_contain_text("Rome")
    kept = page.get_by_role("button", name="Conversations")
    if kept.get_attribute("aria-expanded") == "false":  # where there is room, they are shown from the start
        kept.click()
    with page.expect_download() as export:
        page.get_by_role("button", name="Export What is the capital of Italy?").click()
    export.value.save_as(tmp_path / "talk.md")
    assert "capital of Italy" in (tmp_path / "talk.md").read_text()
    page.get_by_role("button", name="Delete What is the capital of Italy?").click()
    watched.confirm("Delete")
    watched.expect(said).to_have_count(0)
    page.reload()
    watched.expect(page.get_by_text("Ask vramancer-demo something")).to_be_visible()


def test_an_answer_is_stopped(watched: Watched, demo: Demo) -> None:
    page = watched.page
    watched.go("Chat")
    page.route("**/v1/chat/completions", lambda route: route.continue_(post_data=_endless(route.request.post_data)))
    page.get_by_role("textbox", name="Your question").fill("Tell me a long story.")
    page.get_by_role("button", name="Send").click()
    watched.expect(page.locator(".message.assistant .said")).to_have_text(re.compile(r"\w"))
    page.get_by_role("button", name="Stop").click()
    watched.expect(page.get_by_text("stopped")).to_be_visible()
    until(lambda: demo.ask("/api/queue/status")["unfinished"] == 0, "the server has stopped too")
    watched.expect(page.get_by_role("button", name="Regenerate answer")).to_be_enabled()


def _endless(body: str) -> str:
    """The demo model's stories end soon."""
    return json.dumps({**json.loads(body), "ignore_eos": True})


def test_a_lost_connection_is_said_and_found_again(watched: Watched) -> None:
    page = watched.page
    figure = page.get_by_role("region", name="Batch", exact=True)
    watched.expect(figure).to_be_visible()
    page.route("**/socket.io/**", lambda route: route.abort())
    watched.expect("#banner").to_contain_text("No connection to the server since")
    watched.expect(figure).to_be_visible()
    assert page.locator("body").get_attribute("data-status") == "stale"
    watched.go("Models")
    watched.expect(page.get_by_role("button", name="Unload")).to_be_disabled()
    with page.expect_request("**/socket.io/**"):  # it is there as long as nothing gets through
        page.get_by_role("button", name="Try now").click()
    page.unroute("**/socket.io/**")
    watched.expect("#banner").to_be_empty()
    watched.expect(page.get_by_role("button", name="Unload")).to_be_enabled()
    watched.complaints.clear()


def test_a_session_that_ended_leads_to_signing_in(open_page: Open, demo: Demo) -> None:
    watched = open_page(demo)
    watched.sign_in()
    watched.page.context.clear_cookies()
    watched.expect(watched.page.get_by_label("API token")).to_be_visible()
    watched.complaints.clear()


@pytest.mark.parametrize("size", ["desktop", "tablet", "phone"])
def test_no_page_is_wider_than_the_screen(open_page: Open, demo: Demo, size: str) -> None:
    watched = open_page(demo, size)
    watched.sign_in()
    for name in PAGES:
        watched.go(name)
        wide, screen = watched.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= screen, name


def test_everything_is_reached_by_keys(open_page: Open, demo: Demo) -> None:
    watched = open_page(demo)
    watched.sign_in()
    page = watched.page
    page.keyboard.press("Tab")
    watched.expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    watched.expect(page.get_by_role("main")).to_be_focused()
    for name in PAGES:
        link = page.get_by_role("navigation", name="Pages").get_by_role("link", name=name)
        link.focus()
        page.keyboard.press("Enter")
        watched.expect(page.get_by_role("main")).to_have_attribute("data-page", name.lower())
        watched.expect(page.get_by_role("heading", level=1)).to_have_count(1)
    watched.go("Models")
    page.get_by_role("button", name="Unload").focus()
    page.keyboard.press("Enter")
    watched.expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    watched.expect(page.get_by_role("dialog")).not_to_be_visible()
    watched.expect(page.get_by_role("button", name="Unload")).to_be_focused()


def test_dark_and_light(open_page: Open, demo: Demo) -> None:
    watched = open_page(demo, scheme="light")
    watched.sign_in()
    page = watched.page
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Switch to dark").click()
    dark = page.evaluate(ground)
    assert light != dark
    page.reload()
    watched.expect(".connection.live").to_be_attached()
    assert page.evaluate(ground) == dark, "the choice is kept"
    page.emulate_media(color_scheme="dark")
    page.evaluate("localStorage.clear()")
    page.reload()
    assert page.evaluate(ground) == dark, "as the system says"


def test_read_only_says_why_nothing_can_be_changed(open_page: Open, tmp_path_factory: pytest.TempPathFactory) -> None:
    demo = Demo(tmp_path_factory.mktemp("read-only"), "--read-only")
    try:
        demo.wait()
        watched = open_page(demo)
        watched.sign_in()
        watched.expect(watched.page.locator(".badge").get_by_text("Read-only")).to_be_visible()
        watched.go("Models")
        unload = watched.page.get_by_role("button", name="Unload")
        watched.expect(unload).to_be_disabled()
        watched.expect(unload).to_have_attribute("title", "The server is in read-only mode.")
        watched.go("Pipeline")
        watched.expect(watched.page.get_by_role("button", name="Move the model")).to_be_disabled()
        watched.go("Chat")
        watched.page.get_by_role("textbox", name="Your question").fill("Hello!")
        watched.page.get_by_role("button", name="Send").click()
        watched.expect(watched.page.locator(".message.assistant .said")).to_have_text(re.compile(r"\w"))
        watched.page.goto("about:blank")
    finally:
        demo.stop()
