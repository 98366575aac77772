"""VRAMancer's own engine, called in-process: no HTTP, but the same pipeline that the server drives."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.base import PeerUnavailable, RequestTrace, RunResult, Score

BLOCK_SLACK_TOKENS = 64
"""KV room beyond a request's own tokens, since whole blocks are given out."""


def engine_overrides(model_dir: Path, threads: int, max_streams: int, max_context: int) -> dict[str, Any]:
    """Settings of the engine under test, keyed like flags: its defaults, on the CPU, with room for every stream."""
    return {
        "model.name": str(model_dir),
        "devices.devices": "cpu",
        "devices.cpu_threads": threads,
        "engine.max_batch_size": max(64, max_streams),
        "engine.max_queue": max(256, max_streams),
        "engine.kv_cache_tokens": max_streams * (max_context + BLOCK_SLACK_TOKENS),
    }


class OursPeer:
    """Greedy requests through ``InferencePipeline.submit_many``, all answers gathered by one thread."""

    name = "ours"

    def load(
        self, model_dir: Path, threads: int, max_streams: int, max_context: int,
        settings: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Build the pipeline from defaults, configuration and environment, then load the model. `settings`
        ("section.key") are put in place of those that benchmarks have."""
        try:
            from core.config import load_settings
            from core.inference_pipeline import InferencePipeline
            from vramancer import __version__
        except ImportError as error:
            raise PeerUnavailable(f"VRAMancer's engine cannot be imported ({error})") from error
        overrides = engine_overrides(model_dir, threads, max_streams, max_context) | dict(settings or {})
        self._pipeline = InferencePipeline(load_settings(overrides=overrides))
        model = self._pipeline.load()
        engine = self._pipeline.engine
        return {
            "engine": f"vramancer {__version__}",
            "attention": ", ".join(engine.backends),
            "dtype": model.dtype,
            "max_num_batched_tokens": engine.settings.engine.max_num_batched_tokens,
        }

    def run(self, prompts: list[list[int]], max_tokens: int) -> RunResult:
        """Submit every prompt at once and follow all until they are complete."""
        from core.request import RequestOutput, SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        traces = [RequestTrace() for _ in prompts]
        arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()
        start_s = time.perf_counter()
        self._pipeline.submit_many([(prompt, params) for prompt in prompts], sink=arrivals)
        unfinished = len(prompts)
        while unfinished:
            index, message = arrivals.get()
            now_s = time.perf_counter() - start_s
            if not isinstance(message, RequestOutput):
                raise message
            for delta in message.deltas:
                traces[index].token_ids.extend(delta.token_ids)
                traces[index].times_s.extend([now_s] * len(delta.token_ids))
            unfinished -= message.finished
        return RunResult(time.perf_counter() - start_s, traces)

    def score(self, texts: list[list[int]], counted: list[list[bool]]) -> Score:
        """By the log-probabilities of prompts."""
        from core.request import RequestOutput, SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pipeline.submit_many([(text, params) for text in texts], sink=arrivals)
        unfinished, found = len(texts), Score(0.0, 0)
        while unfinished:
            index, message = arrivals.get()
            if not isinstance(message, RequestOutput):
                raise message
            for each, counts in zip(message.prompt_logprobs or (), counted[index], strict=False):
                if each is not None and counts:
                    found.log_probability += each.logprob
                    found.tokens += 1
            unfinished -= message.finished
        return found

    def close(self) -> None:
        """Shut the pipeline down."""
        self._pipeline.shutdown()
