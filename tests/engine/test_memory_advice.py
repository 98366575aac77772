"""What an error of memory advises is computed: planned again as advised, the model fits."""

from __future__ import annotations

import re
from typing import Any

import pytest
from plain_settings import make_settings

from core.config import iter_settings
from core.devices import HOST, Device
from core.engine.preview import Preview, preview
from core.errors import InsufficientMemoryError


def refusal(*gpus: str, **overrides: Any) -> InsufficientMemoryError:
    """The demo model's, with room for steps of 512 tokens and nothing else."""
    with pytest.raises(InsufficientMemoryError) as caught:
        plan(*gpus, **overrides)
    return caught.value


def plan(*gpus: str, **overrides: Any) -> Preview:
    return preview(make_settings(**overrides), gpus)


def advised(error: InsufficientMemoryError) -> dict[str, str]:
    """Flag to value, of each piece of advice."""
    assert "What fits: " in error.message
    found = dict(re.findall(r"(--[a-z-]+) ([\w,]*\w)", error.message.partition("What fits: ")[2]))
    assert found
    return found


def mib(size: float) -> str:
    return f"{round(size * 1024)}KiB@900GB/s"


def test_a_shorter_context_that_is_named_is_the_longest_that_fits() -> None:
    given: dict[str, Any] = {"model__max_model_len": 2048, "devices__stream_weights": "off"}
    flags = advised(refusal(mib(25), **given))
    tokens = int(flags["--max-model-len"])
    assert 16 <= tokens < 2048
    plan(mib(25), **given | {"model__max_model_len": tokens})
    refusal(mib(25), **given | {"model__max_model_len": tokens + 16})


def test_layers_that_are_named_fit_by_hand() -> None:
    given: dict[str, Any] = {"devices__layers": "1,5", "devices__stream_weights": "off"}
    error = refusal(mib(30), mib(17), **given)
    said = re.search(r"at least ([1-4]) layers fewer on 17\d*KiB", error.message)
    assert said is not None
    fewer = int(said[1])
    plan(mib(60), mib(17), **given | {"devices__layers": f"{1 + fewer},{5 - fewer}"})
    refusal(mib(60), mib(17), **given | {"devices__layers": f"{fewer},{6 - fewer}"})
    layers = advised(error)["--layers"]
    assert layers != "1,5"
    plan(mib(30), mib(17), **given | {"devices__layers": layers})


def test_a_device_may_be_left_out_by_hand() -> None:
    given: dict[str, Any] = {"devices__layers": "1,5", "devices__stream_weights": "off"}
    layers = advised(refusal(mib(30), mib(8), **given))["--layers"]
    assert layers == "6,0"
    plan(mib(30), mib(8), **given | {"devices__layers": layers})


def test_streaming_is_named_where_it_is_off_and_would_do() -> None:
    error = refusal(mib(22), devices__stream_weights="off")
    assert advised(error)["--stream-weights"] == "auto"
    assert re.search(r"with [\d.]+ MiB of layers in main memory", error.message)
    assert sum(len(stage.streamed_layers) for stage in plan(mib(22)).placement.stages) > 0
    assert "--stream-weights" not in refusal(mib(3), devices__stream_weights="off").message


def test_streaming_that_lacks_main_memory_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.engine.model_plan.host_for", lambda *given: Device(HOST, -1, "cpu", "cpu", 1000))
    message = refusal(devices__devices="sim=21MiB@900GB/s/70TFLOPS").message
    assert "host lacks" in message
    assert "--stream-weights" not in message


def test_the_strategy_that_finds_a_plan_is_named() -> None:
    given: dict[str, Any] = {"devices__placement": "balanced", "devices__stream_weights": "off"}
    assert advised(refusal(mib(22), mib(17), **given))["--placement"] == "profiled"
    plan(mib(22), mib(17), **given | {"devices__placement": "profiled"})


def test_lent_memory_counts() -> None:
    cards = "sim=17MiB@900GB/s/70TFLOPS,sim=16MiB@900GB/s/70TFLOPS"
    given: dict[str, Any] = {"devices__devices": cards, "devices__stream_weights": "off"}
    tokens = int(advised(refusal(**given, model__max_model_len=2048))["--max-model-len"])
    shorter = plan(**given, model__max_model_len=tokens)
    assert shorter.pooled.tokens >= tokens > shorter.placement.kv_tokens, "some of it is borrowed"


@pytest.mark.parametrize("size", [0.1, 1, 10])
def test_what_fits_in_no_way_says_how_much_there_is(size: float) -> None:
    error = refusal(mib(size))
    assert "What fits" not in error.message
    assert re.search(r"weights take [\d.]+ MiB", error.message)
    assert re.search(r"may use [\d.]+ [KM]iB: give it larger or more --devices", error.message)


def test_sizes_are_for_people_and_flags_exist() -> None:
    flags = {info.flag for info in iter_settings()}
    for error in (refusal(mib(1)), refusal(mib(22), devices__stream_weights="off")):
        assert not re.search(r"\d{5,} ?(B\b|bytes)", error.message)
        assert set(re.findall(r"--[a-z-]+", error.message)) <= flags
        assert all(count > 0 for count in error.lacking_bytes.values())
