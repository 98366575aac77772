"""An emulated device that reads its memory for another one is late with its own work by as much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from steering import LONGEST_WAIT_S
from tiny_models import build_tiny

from core.emulation.stage import GuestTime
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)


def test_what_is_added_is_taken_once() -> None:
    guests = GuestTime()
    guests.add("a", 0.5)
    guests.add("a", 0.25)
    assert guests.take("b") == 0.0
    assert guests.take("a") == 0.75
    assert guests.take("a") == 0.0


@pytest.mark.parametrize(("busy", "least_s"), [(True, 0.4), (False, 0.0)])
def test_guests_delay_a_stage_that_computes_meanwhile_and_no_other(
    open_pipeline: Callable[..., InferencePipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: bool,
    least_s: float,
) -> None:  # fmt: skip
    build_tiny("llama", tmp_path)
    speed = "@1GB/s/100GFLOPS"
    pipeline = open_pipeline(tmp_path, devices__devices=f"sim=64MiB{speed},sim=64MiB{speed}", devices__layers="2,2")
    stage = pipeline.engine.stages[1]
    guests, place = stage._guests, stage.clock.end
    assert guests is not None

    def end(waited_s: float = 0.0) -> None:
        waits.append(waited_s)
        place(waited_s)

    waits: list[float] = []
    model = stage._model
    assert model is not None
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if busy:
            guests.add(stage.device.name, least_s)
        return original(*args, **kwargs)

    monkeypatch.setattr(stage.clock, "end", end)
    monkeypatch.setattr(model, "forward", forward)
    guests.add(stage.device.name, 7.0)  # while the stage is idle
    pipeline.submit([3, 4, 5], ONE).result(LONGEST_WAIT_S)
    assert waits == [least_s]
