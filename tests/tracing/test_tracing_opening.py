"""Tracing that is off costs nothing, not even an import; on without its packages, it says which to install."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any, cast

import pytest
from plain_settings import CACHE_DIR, make_settings

from core.config import TracingSettings
from core.errors import ConfigError
from core.execution.step_times import KEPT_STEPS, StepTimes
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams
from core.tracing import open_tracing

OFF = """
import sys
from plain_settings import make_settings
from core.api import create_app
from core.inference_pipeline import InferencePipeline

pipeline = InferencePipeline(make_settings(
    model__name=sys.argv[1], devices__devices="cpu=64MiB", devices__placement="vram", devices__profile_seconds=0.02,
    runtime__cache_dir=sys.argv[2], api__token="a-token-for-tests-only",
))
pipeline.load()
client = create_app(pipeline).test_client()
body = {"prompt": [5, 6], "max_tokens": 3}
answer = client.post("/v1/completions", json=body, headers={
    "X-API-TOKEN": "a-token-for-tests-only", "traceparent": f"00-{'1' * 32}-{'2' * 16}-01",
})
assert answer.status_code == 200, answer.text
pipeline.shutdown()
print([name for name in sys.modules if name.partition(".")[0] == "opentelemetry" or name.startswith("core.tracing.")])
"""


def test_off_it_is_not_even_imported(llama: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFF, str(llama), str(CACHE_DIR)], capture_output=True, text=True, timeout=600,
        check=False, cwd=Path(__file__).parents[2], env={"PYTHONPATH": ".:tests", "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_off_nothing_is_noted(llama: Path, open_pipeline: Callable[..., InferencePipeline]) -> None:
    pipeline = open_pipeline(llama)
    assert open_tracing(TracingSettings()) is None and pipeline.tracing is None
    results: list[Any] = []
    execute = pipeline.engine.runner.execute

    def noting(output: Any) -> Any:
        results.append(execute(output))
        return results[-1]

    pipeline.engine.batcher._runner = cast(Any, Fake(execute=noting))
    pipeline.submit([5, 6], SamplingParams(max_tokens=3)).result(60)
    assert results and all(result.stage_s == {} for result in results)
    assert all(stage.times is None for stage in pipeline.engine.stages)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As where the package is not installed."""
    for name in list(sys.modules):
        if name.startswith(("core.tracing.", f"{package}.")) or name == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, cast(Any, None))


@pytest.mark.parametrize("package", ["opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter"])
def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    without(monkeypatch, package)
    with pytest.raises(ConfigError) as caught:
        InferencePipeline(make_settings(tracing__enabled=True))
    message = caught.value.message
    assert "VRM_TRACING" in message and package in message and "pip install 'vramancer[tracing]'" in message


def test_another_missing_package_is_no_matter_of_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "structlog")
    for name in [name for name in sys.modules if name == "core.logs"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="structlog"):
        open_tracing(TracingSettings(enabled=True))


def test_times_of_the_last_steps_are_kept() -> None:
    times = StepTimes()
    for step in range(KEPT_STEPS + 3):
        times.add(step, step / 2)
    assert [times.take(step) for step in (0, 2, 3, KEPT_STEPS + 2)] == [0.0, 0.0, 1.5, (KEPT_STEPS + 2) / 2]
    assert times.take(3) == 0.0, "once"


class Event:
    """A GPU's event: it happens when the test says so."""

    def __init__(self, at_ms: float, happened: bool) -> None:
        self.at_ms, self.happened = at_ms, happened

    def query(self) -> bool:
        return self.happened

    def elapsed_time(self, other: Event) -> float:
        return other.at_ms - self.at_ms


def test_a_gpu_s_time_is_read_once_it_is_known(llama: Path, open_pipeline: Callable[..., InferencePipeline]) -> None:
    stage = open_pipeline(llama).engine.stages[0]
    stage.times = StepTimes()
    before_s, late = stage.busy_s, Event(31.0, False)
    stage._timed.extend(cast(Any, [(1001, Event(1.0, True), Event(9.0, True)), (1002, Event(9.0, True), late)]))
    assert stage.seconds(1001) == pytest.approx(0.008)
    assert stage.seconds(1002) == 0.0, "not over"
    late.happened = True
    assert stage.seconds(1002) == pytest.approx(0.022)
    assert stage.busy_s - before_s == pytest.approx(0.030)
