"""transformers' ``model.generate()``: one stream, or several as one left-padded batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from benchmarks.peers.base import RequestTrace, RunResult


class _Clock(BaseStreamer):  # type: ignore[misc]  # transformers is not type-checked
    """Notes when each step's tokens arrive; the first ``put`` is the prompt."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()
        self.times_s: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the tokens of one step."""
        if self._prompt_seen:
            self.times_s.append(time.perf_counter() - self.start_s)
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is buffered."""


def left_pad(prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of a batch whose prompts all end in the last column."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


class GeneratePeer:
    """Static batching: everybody starts together and waits for the longest."""

    name = "generate"
    dtype = "auto"

    def load(self, model_dir: Path, threads: int, max_streams: int, max_context: int) -> dict[str, Any]:
        """Load with the attention that transformers itself picks."""
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=self.dtype).eval()
        self._model.generation_config.eos_token_id = None
        return {
            "engine": f"transformers {transformers.__version__}",
            "attention": self._model.config._attn_implementation,
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }

    def run(self, prompts: list[list[int]], max_tokens: int) -> RunResult:
        """Generate for all prompts in one batch."""
        config = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, eos_token_id=None, pad_token_id=0)
        clock = _Clock()
        ids, mask = left_pad(prompts, pad_id=0)
        output = self._model.generate(ids, attention_mask=mask, generation_config=config, streamer=clock)
        wall_s = time.perf_counter() - clock.start_s
        new_tokens = output[:, ids.shape[1] :].tolist()
        return RunResult(wall_s, [RequestTrace(tokens, list(clock.times_s)) for tokens in new_tokens])

    def close(self) -> None:
        """Drop the model."""
        del self._model


class GenerateF32Peer(GeneratePeer):
    """In fp32: twice the bytes, yet on CPUs without bf16 instructions torch multiplies it much faster."""

    name = "generate-f32"
    dtype = "float32"
