"""transformers' continuous batching (``ContinuousBatchingManager``), kept running between runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.peers.base import RequestTrace, RunResult

PAGE_TOKENS = 32


class ContinuousBatchingPeer:
    """Requests join and leave at every step; SDPA over a paged cache, which is what it has on a CPU."""

    name = "transformers-cb"
    dtype = "auto"

    def load(self, model_dir: Path, threads: int, max_streams: int, max_context: int) -> dict[str, Any]:
        """Load the model and start the manager's thread."""
        torch.set_num_threads(threads)
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=self.dtype, attn_implementation="sdpa").eval()
        model.generation_config.eos_token_id = -1
        pages_per_request = -(-max_context // PAGE_TOKENS) + 1
        batching = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=max_streams * pages_per_request + 8,
            max_batch_tokens=512,
            max_requests_per_batch=max_streams,
        )
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=batching,
        )
        self._manager.start()
        return {
            "engine": f"transformers {transformers.__version__}",
            "attention": model.config._attn_implementation,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_batch_tokens": batching.max_batch_tokens,
        }

    def run(self, prompts: list[list[int]], max_tokens: int) -> RunResult:
        """Submit every prompt at once and wait for all of them."""
        start_s = time.perf_counter()
        order = [
            self._manager.add_request(prompt, max_new_tokens=max_tokens, record_timestamps=True, eos_token_id=-1)
            for prompt in prompts
        ]
        finished: dict[str, RequestTrace] = {}
        while len(finished) < len(order):
            output = self._manager.get_result(timeout=5)
            if output is None:
                if not self._manager.is_running():
                    raise RuntimeError("the continuous batching thread stopped")
                continue
            if output.error:
                raise RuntimeError(output.error)
            if output.is_finished():
                times_s = [stamp - start_s for stamp in output.timestamps]
                finished[output.request_id] = RequestTrace(list(output.generated_tokens), times_s)
        wall_s = time.perf_counter() - start_s
        return RunResult(wall_s, [finished[request_id] for request_id in order])

    def close(self) -> None:
        """Stop the manager's thread."""
        self._manager.stop(block=True, timeout=10)


class ContinuousBatchingF32Peer(ContinuousBatchingPeer):
    """In fp32: twice the bytes, yet on CPUs without bf16 instructions torch multiplies it much faster."""

    name = "transformers-cb-f32"
    dtype = "float32"
