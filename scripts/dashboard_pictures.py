"""Takes the pictures of the dashboard in docs/pictures: `python scripts/dashboard_pictures.py`.

Starts a server with the demo model on two parts of the processor, keeps it busy, and looks at it with Chromium, which
has to be installed, as has playwright.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
TOKEN = "only-for-these-pictures"
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
SHOTS = (
    ("overview", "desktop", "dark"),
    ("overview", "desktop", "light"),
    ("memory", "desktop", "dark"),
    ("pipeline", "desktop", "light"),
    ("chat", "desktop", "dark"),
    ("overview", "phone", "dark"),
    ("chat", "phone", "light"),
)
WARM_S = 45.0
"""How long the server works before the first picture, so that curves have a shape."""
QUESTION = "What is the capital of France?"


def main() -> None:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is not installed.")
    PICTURES.mkdir(exist_ok=True)
    with server() as url, busy(url), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        watching = sign_in(browser, url, "desktop", "dark")  # so that there is a curve
        time.sleep(WARM_S)
        for page, size, scheme in SHOTS:
            take(browser, url, page, size, scheme)
        watching.close()
        browser.close()


def take(browser: Any, url: str, name: str, size: str, scheme: str) -> None:
    context = sign_in(browser, url, size, scheme)
    page = context.pages[0]
    page.goto(f"{url}/dashboard#/{name}")
    page.wait_for_timeout(3000)
    if name == "chat":
        page.get_by_label("Your question").fill(QUESTION)
        page.get_by_label("Your question").press("Enter")
        page.get_by_role("button", name="Regenerate answer").wait_for()
    file = PICTURES / f"{name}-{size}-{scheme}.png"
    page.screenshot(path=file)
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size // 1024} KiB")
    context.close()


def sign_in(browser: Any, url: str, size: str, scheme: str) -> Any:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(300_000)
    page.goto(f"{url}/dashboard")
    page.get_by_label("API token").fill(TOKEN)
    page.get_by_role("button", name="Sign in").click()
    page.locator(".connection.live").wait_for(state="attached")
    return context


@contextmanager
def server() -> Iterator[str]:
    with socket.socket() as probe, tempfile.TemporaryDirectory() as home:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "XDG_"))}
        command = [
            sys.executable, "-m", "vramancer.main", "--api", "--port", url.rpartition(":")[2], "--metrics-port", "0",
            "--devices", "cpu=32MiB,cpu=48MiB", "--placement", "vram", "--kv-cache-tokens", "2048", "--host-bytes",
            str(4 << 20), "--disk-path", f"{home}/kv", "--disk-min-free-bytes", "0", "--log-level", "error",
        ]  # fmt: skip
        process = subprocess.Popen(command, env={**inherited, "HOME": home, "VRM_API_TOKEN": TOKEN}, cwd=ROOT)
        try:
            while True:
                try:
                    with urllib.request.urlopen(f"{url}/ready", timeout=5):
                        break
                except (urllib.error.URLError, OSError):
                    if process.poll() is not None:
                        raise SystemExit("The server did not start.") from None
                    time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


@contextmanager
def busy(url: str) -> Iterator[None]:
    """A few requests at a time, of different lengths, with long prompts, so that KV moves."""
    done = threading.Event()

    def work(number: int) -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            prompt = f"{number}-{turn}: " + "once upon a time there was a card with little memory, and " * (
                5 + turn % 5
            )
            body = json.dumps({"prompt": prompt, "max_tokens": 40 + 30 * (turn % 5), "ignore_eos": True}).encode()
            headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers)) as answer:
                answer.read()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        done.set()
        for worker in workers:
            worker.join()


if __name__ == "__main__":
    main()
