"""What a server says once it is ready."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plain_settings import make_settings

from core.engine.preview import preview
from vramancer import __version__
from vramancer.banner import WIDTH, Reached, banner


def pipeline(*gpus: str, **overrides: Any) -> Any:
    """What the banner reads of a pipeline that serves the demo model on these cards."""
    settings = make_settings(**overrides)
    planned = preview(settings, gpus)
    model = SimpleNamespace(name="vramancer-demo", aliases=("demo",), dtype="float32", max_model_len=2048)
    return SimpleNamespace(engine=SimpleNamespace(plan=planned), model=model, settings=settings)


TWO_CARDS = ("22MiB@900GB/s", "22MiB@400GB/s")


def rows(text: str) -> dict[str, str]:
    """Label to text, with what goes on in further lines."""
    found: dict[str, str] = {}
    label = ""
    for line in text.splitlines()[1:]:
        if line.startswith("  ") and line[2] != " ":
            label, _, rest = line.strip().partition(" ")
            found[label] = rest.strip()
        else:
            found[label] += " " + line.strip()
    return found


def test_it_says_where_what_and_how_to_stop(tmp_path: Path) -> None:
    text = banner(pipeline(*TWO_CARDS), Reached("127.0.0.1", 5000, 9108, tmp_path / "api-token"))
    said = rows(text)
    assert text.startswith(f"VRAMancer {__version__} is ready\n")
    assert said["API"] == "http://127.0.0.1:5000/v1"
    assert said["dashboard"] == "http://127.0.0.1:5000/dashboard"
    assert said["model"] == "vramancer-demo, demo (float32, up to 2048 tokens)"
    assert said["metrics"] == "http://127.0.0.1:9108/metrics"
    assert said["stop"].startswith("Ctrl-C")
    assert "\x1b" not in text


def test_a_dashboard_that_is_left_out_is_not_named() -> None:
    assert "dashboard" not in banner(pipeline(*TWO_CARDS, dashboard__enabled=False), Reached("127.0.0.1", 5000, 0))


def test_it_says_the_split_over_the_devices() -> None:
    serving = pipeline(*TWO_CARDS)
    text = banner(serving, Reached("127.0.0.1", 5000, 0))
    stages, pooled = serving.engine.plan.placement.stages, serving.engine.plan.pooled
    assert len(stages) == 2
    for stage, tokens in zip(stages, pooled.local_tokens, strict=True):
        line = next(line for line in text.splitlines() if line.startswith(f"  {stage.device_name}"))
        assert f"layers {stage.first_layer}-{stage.last_layer - 1}, " in line
        assert "MiB of weights" in line
        assert f"{tokens} tokens of KV" in line


def test_devices_without_layers_and_streamed_layers_are_named() -> None:
    idle = pipeline("24GiB@936GB/s", "1GiB@100GB/s", devices__layers="6,0")
    assert "holds no layers" in banner(idle, Reached("127.0.0.1", 5000, 0))
    streaming = banner(pipeline("22MiB@900GB/s"), Reached("127.0.0.1", 5000, 0))
    assert "layers streamed in" in " ".join(streaming.split())


def test_lines_fit_into_a_terminal() -> None:
    text = banner(pipeline(*TWO_CARDS), Reached("127.0.0.1", 5000, 9109, Path("/home/me/.local/token"), "t" * 43))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.count("t" * 43) == 1


@pytest.mark.parametrize(
    ("file", "new", "said"),
    [
        (None, None, "the one in VRM_API_TOKEN or api.token"),
        (Path("/s/t"), None, "kept in /s/t"),
        (Path("/s/t"), "abc", "abc (new, shown only now; kept in /s/t)"),
    ],
)
def test_it_says_where_the_token_is(file: Path | None, new: str | None, said: str) -> None:
    assert rows(banner(pipeline(*TWO_CARDS), Reached("127.0.0.1", 5000, 0, file, new)))["token"] == said


@pytest.mark.parametrize(
    ("port", "said"),
    [(0, "off"), (9108, "http://127.0.0.1:9108/metrics"), (9110, "http://127.0.0.1:9110/metrics (9108 was taken)")],
)
def test_it_says_where_metrics_are(port: int, said: str) -> None:
    assert rows(banner(pipeline(*TWO_CARDS), Reached("127.0.0.1", 5000, port)))["metrics"] == said


@pytest.mark.parametrize("file", [None, Path("/a folder/token")])
def test_the_example_is_one_command(file: Path | None) -> None:
    text = banner(pipeline(*TWO_CARDS), Reached("::1", 5000, 0, file))
    words = shlex.split(text[text.index("curl ") :].replace("\\\n", " "))
    assert words[:2] == ["curl", "http://[::1]:5000/v1/completions"]
    assert words[2::2] == ["-H", "-H", "-d"]
