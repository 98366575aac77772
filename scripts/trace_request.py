#!/usr/bin/env python3
"""Count the files of this repository that one streamed chat request crosses.

    python scripts/trace_request.py --max 40

loads the demo model, sends `POST /v1/chat/completions` to the application and prints, in the order in which they are
first entered by any thread, the files under `core/` and `vramancer/` of whose functions the request calls one: from
where the application is entered until the last event has been sent and the engine is done with the request. Loading
does not count, nor does what only the first request fills (caches, modules that are imported late): another request
goes before it. With `--max`, more files than that are an error.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(f"{ROOT / package}/" for package in ("core", "vramancer"))
TOKEN = "a-token-for-the-trace"
QUESTIONS = ("What is the opposite of cold?", "How many legs does a spider have?")


class FileTrace:
    """Notes the files of `OURS` in which a function is entered, by threads that start after it was installed."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        """File, relative to the repository, to the function through which it was first entered."""
        self._on = False

    def install(self) -> None:
        """For this thread and those that start from now on."""
        threading.setprofile(self._event)
        sys.setprofile(self._event)

    def uninstall(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def _event(self, frame: FrameType, event: str, argument: object) -> None:
        if self._on and event == "call":
            self._enter(frame.f_code)

    def _enter(self, code: CodeType) -> None:
        is_function = code.co_flags & inspect.CO_OPTIMIZED  # and no body of a module or class
        if is_function and code.co_filename.startswith(OURS):
            file = str(Path(code.co_filename).relative_to(ROOT))
            self.files.setdefault(file, getattr(code, "co_qualname", code.co_name))


def ask(client: Any, question: str, max_tokens: int) -> int:
    """One streamed chat request, read to its end. Returns the number of its events."""
    body = {
        "messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": max_tokens, "seed": 1,
        "ignore_eos": True,
    }  # fmt: skip
    with client.post("/v1/chat/completions", json=body, headers={"X-API-TOKEN": TOKEN}) as response:
        events: list[str] = response.get_data(as_text=True).split("\n\n")
    if response.status_code != 200 or events[-2:] != ["data: [DONE]", ""]:
        raise SystemExit(f"error: the request failed: {response.status} {events[-2:]}")
    return len(events) - 1


def trace_request(devices: str, max_tokens: int, cache_dir: Path | None) -> dict[str, str]:
    """What one request crosses: see `FileTrace.files`."""
    from core.api import create_app
    from core.config import load_settings
    from core.inference_pipeline import InferencePipeline

    overrides: dict[str, Any] = {"devices.devices": devices, "devices.placement": "vram", "logging.level": "warning"}
    overrides["monitoring.interval_s"] = 3600.0  # readings of the devices are no part of a request
    if cache_dir is not None:
        overrides["runtime.cache_dir"] = cache_dir
    with tempfile.TemporaryDirectory() as empty:  # no settings of whoever runs it
        settings = load_settings(environ={"XDG_CONFIG_HOME": empty}, overrides=overrides)
    trace = FileTrace()
    trace.install()
    pipeline = InferencePipeline(settings)
    try:
        pipeline.load()
        client = create_app(pipeline, token=TOKEN).test_client()
        batcher = pipeline.engine.batcher
        ask(client, QUESTIONS[0], max_tokens)
        batcher.call(lambda: None).result()
        with trace.recording():
            ask(client, QUESTIONS[1], max_tokens)
            batcher.call(lambda: None).result()
    finally:
        trace.uninstall()
        pipeline.shutdown()
    return trace.files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max", type=int, help="exit with 1 if there are more files than this")
    parser.add_argument("--devices", default="cpu=1GiB", help="as for `vramancer serve`; one stage each")
    parser.add_argument("--max-tokens", type=int, default=32, help="how long the answer is")
    parser.add_argument("--cache-dir", type=Path, help="where compiled kernels and measurements are kept")
    options = parser.parse_args()
    files = trace_request(options.devices, options.max_tokens, options.cache_dir)
    width = max(map(len, files))
    for number, (file, function) in enumerate(files.items(), start=1):
        print(f"{number:3}  {file:{width}}  {function}")
    print(f"{len(files)} files")
    if options.max is not None and len(files) > options.max:
        print(f"error: a request may cross {options.max} files at most", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
