#!/usr/bin/env python3
"""Write `docs/terminal/*.txt`: what commands look like, 80 and 120 columns wide.

    python scripts/captures.py

The programs' own drawing runs in an emulated terminal. Its figures and its conversation are made up, so that the files
change with the drawing alone.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyte
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.config import Settings, load_settings  # noqa: E402
from core.costs import DeviceProfile  # noqa: E402
from core.engine.best_fit import best_fit  # noqa: E402
from core.engine.preview import Preview, preview  # noqa: E402
from core.profiling.diagnosis import (  # noqa: E402
    Datasheet,
    DeviceDiagnosis,
    Diagnosis,
    LinkDiagnosis,
    compute_bound_streams,
    noise_warnings,
    what_limits,
)
from core.profiling.noise import Noise  # noqa: E402
from scripts.live_example import seen_after  # noqa: E402
from vramancer.banner import Reached, banner  # noqa: E402
from vramancer.cli.chat.answerer import Message, Piece, Sampling  # noqa: E402
from vramancer.cli.chat.conversation import Conversation  # noqa: E402
from vramancer.cli.chat.screen import Screen  # noqa: E402
from vramancer.cli.chat.talk import talk  # noqa: E402
from vramancer.cli.doctor import print_diagnosis  # noqa: E402
from vramancer.cli.fit_view import print_fit  # noqa: E402
from vramancer.cli.live.canvas import Canvas  # noqa: E402
from vramancer.cli.live.controls import Controls  # noqa: E402
from vramancer.cli.live.frame import frame  # noqa: E402
from vramancer.cli.picture import Facts, picture  # noqa: E402
from vramancer.cli.plan_view import print_plan  # noqa: E402

WIDTHS = (80, 120)
GIB = 1 << 30
URL = "http://127.0.0.1:5000"
MODEL = "Qwen/Qwen3-14B"


class Terminal(io.StringIO):
    """An emulated terminal to write to. `text` is what it shows, without spaces at the ends of lines."""

    def __init__(self, width: int, height: int = 100) -> None:
        super().__init__()
        self.screen = pyte.Screen(width, height)
        self.screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        self._stream.feed(text)
        return super().write(text)

    def isatty(self) -> bool:
        return True

    @property
    def encoding(self) -> str:
        return "utf-8"

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip("\n") + "\n"

    def console(self, **options: Any) -> Console:
        """One that draws here, in 256 colours unless the options say otherwise."""
        given = {"force_terminal": True, "color_system": "256", "highlight": False, "legacy_windows": False, **options}
        width, height = self.screen.columns, self.screen.lines
        return Console(file=self, width=width, height=height, _environ={"TERM": "xterm-256color"}, **given)


# -- a server at work --------------------------------------------------------------------------------------------------


def example_facts() -> Facts:
    """Three cards that do not match, the smallest of which borrows."""
    blocks = {"size_tokens": 16, "total": 9000, "with_memory": 8200, "free": 3100, "cached": 1900}
    devices = [
        _device("cuda:0", 24.0, weights=12.6, own=8.4, other=0.8, lent=1.2),
        _device("cuda:1", 16.0, weights=9.4, own=5.2, other=0.7),
        _device("cuda:2", 8.0, weights=5.5, own=1.6, other=0.6, borrowed=1.2),
    ]
    tiers = [
        _tier("L3", 3.1, 16.0, 3968, hits=4100, misses=900),
        _tier("L5", 41.0, 200.0, 52480, hits=310, misses=590),
    ]
    leases = [
        {
            "id": 7, "borrower": "cuda:2", "lender": "cuda:0", "bytes": int(1.2 * GIB), "blocks": 1536,
            "state": "active", "priority": 0, "age_seconds": 312.0,
        }
    ]  # fmt: skip
    pipeline = {
        "ready": True,
        "state": "ready",
        "subsystems": {
            "engine": {"status": "ok", "detail": "48210 steps, 0 failed"},
            "disk": {"status": "degraded", "detail": "192 MiB free"},
        },
        "model": {
            "name": MODEL, "aliases": [], "dtype": "bfloat16", "parameters": 14_800_000_000, "max_model_len": 32768,
            "load_seconds": 41.3,
        },
        "memory": {
            "devices": devices, "kv_blocks": blocks, "stages": [], "leases": leases, "decisions": {}, "tiers": tiers,
            "tier_troubles": {"L6": "store.lan:6379 does not answer"},
        },
        "stages": [_stage("cuda:0", 0, 18), _stage("cuda:1", 19, 31), _stage("cuda:2", 32, 39, (38, 39))],
        "prediction": {"now": {"streams": 3, "predicted": 71.4, "measured": 68.9}},
        "notes": [],
    }  # fmt: skip
    requests = [
        _request("chatcmpl-5d0c7c7e9f6b4a53b8-0", "running", 75.2, 1840, 611),
        _request("chatcmpl-a81f3f0a77f64d0c9d-0", "running", 12.9, 96, 203),
        _request("cmpl-0f7be31d8f6c4b7f8f-0", "running", 3.1, 12004, 4),
        _request("chatcmpl-ee2d1b5a11f34b7a90-0", "waiting", 0.4, 22051, 0),
    ]
    queue = {"running": 3, "waiting": 1, "unfinished": 4, "limit": 256, "requests": requests}
    batcher = {"tokens_per_second": 68.9, "generated_tokens": 1_284_022, "prefix_hit_rate": 0.37}
    return Facts(URL, pipeline, queue, batcher, {"process": {"uptime_s": 94_212.0}})


def _device(
    name: str, limit: float, *, weights: float, own: float, other: float, lent: float = 0.0, borrowed: float = 0.0
) -> dict[str, Any]:
    held = {"weights": weights, "own_kv": own, "lent": lent, "borrowed": borrowed, "other": other}
    free = limit - weights - own - lent - other
    sizes = {f"{part}_bytes": int(amount * GIB) for part, amount in {"limit": limit, **held, "free": free}.items()}
    return {"name": name, **sizes}


def _tier(name: str, used: float, capacity: float, blocks: int, *, hits: int, misses: int) -> dict[str, Any]:
    read = {"L3": 11_400_000_000, "L5": 2_900_000_000}[name]
    return {
        "tier": name, "used_bytes": int(used * GIB), "capacity_bytes": int(capacity * GIB), "blocks": blocks,
        "hits": hits, "misses": misses, "read_bytes_per_second": read,
    }  # fmt: skip


def _stage(device: str, first: int, last: int, streamed: tuple[int, ...] = ()) -> dict[str, Any]:
    return {"device": device, "layers": [first, last], "streamed_layers": list(streamed)}


def _request(name: str, state: str, age_s: float, prompt: int, generated: int) -> dict[str, Any]:
    return {
        "id": name, "state": state, "age_seconds": age_s, "prompt_tokens": prompt, "generated_tokens": generated,
    }  # fmt: skip


def status_capture(width: int) -> str:
    """The picture of `example_facts`."""
    terminal = Terminal(width)
    console = terminal.console()
    console.print(picture(example_facts(), console))
    return terminal.text


DASHBOARD_ROWS = {80: 24, 120: 40}
WATCHED_S = 400
"""How long somebody has watched."""


def dashboard_capture(width: int) -> str:
    """The first page of the dashboard."""
    rows = DASHBOARD_ROWS[width]
    terminal = Terminal(width, rows + 1)
    console = terminal.console()
    for line in frame(seen_after(example_facts(), WATCHED_S), Controls(), Canvas(console, width), rows, 1.0, WATCHED_S):
        console.print(line, no_wrap=True)
    return terminal.text


# -- a conversation ----------------------------------------------------------------------------------------------------

ANSWER = """\
The **5070 Ti** reads memory a little slower than the 3090, but it computes faster. So:

1. Give the 3090 more layers: decoding one stream is bound by how fast weights are read.
2. Leave the 5070 Ti room for KV, which grows with every stream.

| card | bandwidth | layers |
|---|---|---|
| RTX 3090 | 936 GB/s | 24 |
| RTX 5070 Ti | 896 GB/s | 16 |

You can try a split before you load it:

```sh
vramancer plan ./Qwen3-14B --gpu 3090 --gpu 5070ti   # its config.json is enough
```
"""


class _Told:
    """Answers from a text, a few characters a token."""

    model_name = MODEL
    shared_at = URL

    def __init__(self, *answers: str) -> None:
        self._answers = iter(answers)

    def answer(self, messages: list[Message], sampling: Sampling) -> Generator[Piece, None, None]:
        text = next(self._answers)
        for tokens, start in enumerate(range(0, len(text), 4), start=1):
            yield Piece(text[start : start + 4], tokens)

    def serves(self, model: str) -> bool:
        return model == MODEL

    def switch(self, model: str) -> None:
        self.model_name = model


class _Typed:
    """Lines that are typed, shown as the editor shows them."""

    def __init__(self, terminal: Terminal, lines: Iterator[str]) -> None:
        self._terminal = terminal
        self._lines = lines

    def read(self, prompt: str = "> ") -> str:
        line = next(self._lines)
        self._terminal.write(f"{prompt}{line}\n")
        return line


def run_capture(width: int) -> str:
    """A conversation as `vramancer run` shows it."""
    terminal = Terminal(width)
    ticks = itertools.count()
    screen = Screen(terminal.console(), terminal.console(), clock=lambda: next(ticks) / 25)
    terminal.write("$ vramancer run\n")
    screen.note(f"{MODEL} on the server at {URL}; --local loads a model here instead")
    screen.note(f"{MODEL}: /help lists commands, Ctrl-D leaves")
    lines = iter(
        ["I have a 3090 and a 5070 Ti. How should I split?", "/set temperature 0.2", "/set", "/hepl", "/help", "/bye"]
    )
    talk(Conversation(_Told(ANSWER), screen, {}), _Typed(terminal, lines))
    return terminal.text


# -- a plan, and what a machine reaches -----------------------------------------------------------------------------

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def planned(more: Sequence[str] = ()) -> tuple[Preview, Settings]:
    """`LLAMA_8B` on a 3090 and a 5070 Ti."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "llama-8b"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA_8B))
        settings = load_settings(Path(os.devnull), {"HOME": folder}, overrides={"model.name": str(model)})
        return preview(settings, ["3090", "5070ti"], more=more), settings


LLAMA_32B = LLAMA_8B | {
    "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
    "max_position_embeddings": 32768,
}  # fmt: skip


def fit_capture(width: int) -> str:
    """`vramancer plan ./llama-32b --gpu 3090 --gpu 5070ti --max-model-len 8192 --fit`, its first lines."""
    terminal = Terminal(width)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "llama-32b"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA_32B))
        overrides = {"model.name": str(model), "model.max_model_len": 8192}
        settings = load_settings(Path(os.devnull), {"HOME": folder}, overrides=overrides)
        print_fit(best_fit(settings, ["3090", "5070ti"]), terminal.console())
    return terminal.text


def plan_capture(width: int) -> str:
    """`vramancer plan ./llama-8b --gpu 3090 --gpu 5070ti --more 3060`."""
    terminal = Terminal(width)
    print_plan(planned(["3060"])[0], terminal.console())
    return terminal.text


def banner_capture(width: int) -> str:
    """`vramancer serve --model ./llama-8b` on such cards, the first time, while another server has the metrics port."""
    terminal = Terminal(width)
    plan, settings = planned()
    stages = tuple(replace(stage, device_name=f"cuda:{i}") for i, stage in enumerate(plan.placement.stages))
    plan = replace(plan, placement=replace(plan.placement, stages=stages))
    model = SimpleNamespace(name="llama-8b", aliases=(), dtype="bfloat16", max_model_len=131072)
    serving: Any = SimpleNamespace(engine=SimpleNamespace(plan=plan), model=model, settings=settings)
    token_file = Path("/home/me/.local/state/vramancer/api-token")
    terminal.write(banner(serving, Reached("127.0.0.1", 5000, 9109, token_file, "vrm-EXAMPLE")) + "\n")
    return terminal.text


def doctor_capture(width: int) -> str:
    """`vramancer doctor` on two cards of which one was busy."""
    terminal = Terminal(width)
    print_diagnosis(example_diagnosis(), terminal.console())
    return terminal.text


def example_diagnosis() -> Diagnosis:
    """A 3090 that reaches what one expects, and a 5070 Ti that had other work while it was measured."""
    devices = tuple(
        _card(index, product, size, free, bandwidth, rate, sheet)
        for index, (product, size, free, bandwidth, rate, sheet) in enumerate(
            [
                ("NVIDIA GeForce RTX 3090", 23.7, 23.2, 861e9, 65e12, ("RTX 3090", 936e9, 71e12)),
                ("NVIDIA GeForce RTX 5070 Ti", 15.5, 13.9, 402e9, 41e12, ("RTX 5070 Ti", 896e9, 87.9e12)),
            ]
        )
    )
    links = tuple(
        LinkDiagnosis(f"cuda:{src}", f"cuda:{1 - src}", "staged", "measured", 3.1e-5, 11.6e9) for src in (0, 1)
    )
    warning = noise_warnings({"cuda:1": Noise(0.56)})
    return Diagnosis(MODEL, "bfloat16", "2.13.0", 8, devices, links, tuple(warning))


def _card(
    index: int, product: str, size: float, free: float, bandwidth: float, rate: float, sheet: tuple[str, float, float]
) -> DeviceDiagnosis:
    name, total, card = f"cuda:{index}", int(size * GIB), sheet[0]
    rates = ((1, bandwidth), (16, 16 * bandwidth), (256, rate))
    profile = DeviceProfile(
        name, bandwidth, rates, 3e-4, 1e-3, row_overhead_s=2e-6, kv_bandwidth_bytes_s=0.9 * bandwidth
    )
    streams = compute_bound_streams(profile, 2)
    return DeviceDiagnosis(
        name=name, kind="cuda", product=product, total_bytes=total, free_bytes=int(free * GIB),
        limit_bytes=int(0.97 * free * GIB), attention="triton", source="measured", bandwidth_bytes_s=bandwidth,
        kv_bandwidth_bytes_s=profile.kv_bytes_s, flops={str(rows): value for rows, value in rates},
        layer_overhead_s=3e-4, row_overhead_s=2e-6, step_overhead_s=1e-3, sharing=None, compute_bound_streams=streams,
        limits=what_limits(profile, 2, streams),
        datasheet=Datasheet(card, sheet[1], sheet[2], bandwidth / sheet[1], rate / sheet[2]),
    )  # fmt: skip


def captures() -> dict[str, str]:
    """Name of each file, and its text."""
    drawn = {"status": status_capture, "run": run_capture, "plan": plan_capture, "doctor": doctor_capture}
    drawn |= {"banner": banner_capture, "dashboard": dashboard_capture, "fit": fit_capture}
    return {f"{name}-{width}.txt": draw(width) for name, draw in drawn.items() for width in WIDTHS}


def main() -> None:
    folder = ROOT / "docs" / "terminal"
    folder.mkdir(exist_ok=True)
    for name, text in captures().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main()
