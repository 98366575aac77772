"""`docs/start.md`, followed from an empty home on a machine without a GPU.

Blocks marked `test` run in order, as written but for ports, the address and the token. One marked `serve` starts a
server, which goes on until the next one starts.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from doc_pages import REPOSITORY, Block, blocks
from tiny_models import build_tiny, word_tokenizer

PAGE = REPOSITORY / "docs" / "start.md"
TOKEN_FILE = Path(".local", "state", "vramancer", "api-token")
PATIENCE_S = 600
TEMPLATE = "w3 w9 w27 {% for message in messages %}{{ message['content'] }} {% endfor %}w5"

SAID = {
    "vramancer doctor": "Devices, for layers of",
    "vramancer plan ./my-model --devices": "Fits.",
    "vramancer plan ./my-model --gpu": "RTX 2060",
    "/v1/chat/completions": '"finish_reason":"',  # a tiny model ends where it likes
    "from openai import OpenAI": "w",
    "vramancer run": "w",
    "vramancer status": "my-model",
    ":9108/metrics": "vramancer_",
    "/v1/models": '"id":"my-model"',
}
"""By what a block that runs to its end holds: something that it prints."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux", reason="the page's commands are for Linux and Mac, its token file for Linux"
    ),
    pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl"),
]


def free_ports() -> tuple[int, int]:
    with socket.socket() as api, socket.socket() as metrics:
        api.bind(("127.0.0.1", 0))
        metrics.bind(("127.0.0.1", 0))
        return api.getsockname()[1], metrics.getsockname()[1]


def write_program(path: Path, arguments: str) -> None:
    """A program that runs this Python, whichever is first on PATH otherwise."""
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
    path.chmod(0o755)


@dataclass
class Reader:
    """Somebody who follows the page in `folder`, with an empty home and the model beside it."""

    folder: Path
    ports: tuple[int, int] = field(default_factory=free_ports)
    server: subprocess.Popen[bytes] | None = None
    banners: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home.mkdir()
        self.programs.mkdir()
        write_program(self.programs / "vramancer", "-m vramancer.main")
        write_program(self.programs / "python", "")
        model = build_tiny("llama", self.folder / "my-model", tie_word_embeddings=False)
        with torch.no_grad():  # an answer has words: it neither is nor begins with what is no text
            model.get_output_embeddings().weight[:3] = 0.0
        model.save_pretrained(self.folder / "my-model")
        (self.folder / "my-model" / "generation_config.json").write_text('{"do_sample": false}')
        tokenizer = word_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(self.folder / "my-model")

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def programs(self) -> Path:
        return self.folder / "programs"

    @property
    def environment(self) -> dict[str, str]:
        """Nothing is configured but the ports."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "XDG_", "HF_"))}
        return {
            **inherited, "HOME": str(self.home), "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80",
            "PATH": f"{self.programs}{os.pathsep}{inherited['PATH']}", "HF_HUB_OFFLINE": "1",
            "VRM_API_PORT": str(self.ports[0]), "VRM_METRICS_PORT": str(self.ports[1]),
        }  # fmt: skip

    def written(self, text: str) -> str:
        """The block's text for this machine."""
        text = text.replace(":5000/", f":{self.ports[0]}/").replace(":9108/", f":{self.ports[1]}/")
        text = text.replace("192.168.1.20", "127.0.0.1")
        return (
            text.replace("YOUR-TOKEN", (self.home / TOKEN_FILE).read_text().strip()) if "YOUR-TOKEN" in text else text
        )

    def command(self, block: Block) -> list[str]:
        if block.language == "python":
            return ["python", "-c", self.written(block.text)]
        return ["bash", "-euo", "pipefail", "-c", self.written(block.text)]

    def run(self, block: Block) -> str:
        """What a block prints that has to end well."""
        done = subprocess.run(
            self.command(block), cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def serve(self, block: Block) -> None:
        """Starts the block's server in place of the one that runs, and waits until it is ready."""
        self.stop()
        log = self.folder / "server.log"
        with log.open("wb") as output:
            self.server = subprocess.Popen(
                self.command(block), cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_ready():
            assert self.server.poll() is None, f"{block.text}\n{log.read_text()}"
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        self.banners.append(log.read_text())

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[0]}/ready", timeout=10):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """Ctrl-C, as in a terminal: all that the block started gets it."""
        if self.server is None:
            return
        server, self.server = self.server, None
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGINT)
        try:
            assert server.wait(PATIENCE_S) == 0, (self.folder / "server.log").read_text()
        except BaseException:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
            raise


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    follower = Reader(tmp_path)
    yield follower
    follower.stop()


def test_the_page_can_be_followed_without_a_gpu(reader: Reader) -> None:
    said = dict(SAID)
    for block in blocks(PAGE):
        if "serve" in block.marks:
            reader.serve(block)
        elif "test" in block.marks:
            printed = reader.run(block)
            for part in [part for part in said if part in block.text]:
                assert said.pop(part) in printed, f"{block.text}\n{printed}"
    assert not said, "every step is on the page"
    reader.stop()

    local, everywhere = reader.banners
    for banner in reader.banners:
        assert "cpu#0" in banner and "cpu#1" in banner
        assert "holds no layers" not in banner, "both devices hold layers of the model"
    assert f"kept in {reader.home / TOKEN_FILE}" in " ".join(local.split())
    assert f"http://0.0.0.0:{reader.ports[0]}/v1" in everywhere
