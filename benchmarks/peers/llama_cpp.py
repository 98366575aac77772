"""llama.cpp through llama-cpp-python's low-level API: one context, several sequences in one batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.peers.base import PeerUnavailable, RequestTrace, RunResult, Score

BATCH_TOKENS = 512


class LlamaCppPeer:
    """Prompts go through in batches of 512 tokens, then every step decodes one token of each sequence together."""

    name = "llama.cpp"
    dtype = "bf16"
    flash_attention = True

    def load(self, model_dir: Path, threads: int, max_streams: int, max_context: int) -> dict[str, Any]:
        """Convert the checkpoint to GGUF beside itself (once) and open a context with room for every stream."""
        try:
            import llama_cpp

            from benchmarks.gguf_export import gguf_of

            path = gguf_of(model_dir, model_dir.parent / "gguf", self.dtype, threads)
        except ImportError as error:
            raise PeerUnavailable(f"{error.name} is not installed (pip install llama-cpp-python gguf)") from error
        except ValueError as error:
            raise PeerUnavailable(str(error)) from error
        self._lib = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context = llama_cpp.llama_init_from_model(
            self._model, self._context_params(threads, max_streams, max_context)
        )
        if not self._context:
            raise RuntimeError("llama.cpp could not create a context")
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        return {
            "engine": f"llama-cpp-python {llama_cpp.__version__}",
            "dtype": self.dtype,
            "flash_attention": self.flash_attention,
            "kv_cache": "f16",
            "system": llama_cpp.llama_print_system_info().decode().strip(),
        }

    def _context_params(self, threads: int, max_streams: int, max_context: int) -> Any:
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_ctx = max_streams * (-(-max_context // 256) * 256)
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = max_streams
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False  # a buffer per sequence: attention then never reads another sequence's cells
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if self.flash_attention else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        return params

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> dict[int, npt.NDArray[np.float32]]:
        """Process (token, position, sequence, wants logits) records; returns views of the logits by sequence."""
        batch, lib = self._batch, self._lib
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wants_logits) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wants_logits
        status = lib.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}")
        return {
            sequence: np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, i), shape=(self._vocab,))
            for i, (_, _, sequence, wants_logits) in enumerate(tokens)
            if wants_logits
        }

    def forget(self) -> None:
        """Empty the KV cache."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)

    def run(self, prompts: list[list[int]], max_tokens: int) -> RunResult:
        """Prefill every prompt, then decode all sequences in lockstep."""
        self.forget()
        start_s = time.perf_counter()
        traces = [RequestTrace() for _ in prompts]

        def take(logits: dict[int, npt.NDArray[np.float32]]) -> None:
            for sequence, row in logits.items():
                traces[sequence].token_ids.append(int(row.argmax()))
                traces[sequence].times_s.append(time.perf_counter() - start_s)

        queue = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for first in range(0, len(queue), BATCH_TOKENS):
            take(self.decode(queue[first : first + BATCH_TOKENS]))
        for step in range(max_tokens - 1):
            take(
                self.decode(
                    [
                        (trace.token_ids[-1], len(prompt) + step, sequence, True)
                        for sequence, (prompt, trace) in enumerate(zip(prompts, traces, strict=True))
                    ]
                )
            )
        return RunResult(time.perf_counter() - start_s, traces)

    def score(self, texts: list[list[int]], counted: list[list[bool]]) -> Score:
        """One text after another, in batches that give the logits of every token."""
        found = Score(0.0, 0)
        for text, counts in zip(texts, counted, strict=True):
            self.forget()
            for first in range(0, len(text) - 1, BATCH_TOKENS):
                part = text[first : min(first + BATCH_TOKENS, len(text) - 1)]
                self.decode([(token, first + i, 0, True) for i, token in enumerate(part)])
                for i, following in enumerate(text[first + 1 : first + 1 + len(part)]):
                    if counts[first + 1 + i]:
                        row = self._lib.llama_get_logits_ith(self._context, i)
                        logits = np.ctypeslib.as_array(row, shape=(self._vocab,)).astype(np.float64)
                        most = logits.max()
                        found.log_probability += float(logits[following] - most - np.log(np.exp(logits - most).sum()))
                        found.tokens += 1
        return found

    def close(self) -> None:
        """Free the batch, the context and the model."""
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


class LlamaCppF16Peer(LlamaCppPeer):
    """The same with fp16 weights: equal in size, and some CPUs convert them faster."""

    name = "llama.cpp-f16"
    dtype = "f16"


class LlamaCppQ80Peer(LlamaCppPeer):
    """8.5 bits a weight, which its own quantizer makes of the same weights; activations are rounded to 8 bits."""

    name = "llama.cpp-q8_0"
    dtype = "q8_0"


class LlamaCppQ40Peer(LlamaCppPeer):
    """4.5 bits a weight; the output layer takes 6.6 (Q6_K)."""

    name = "llama.cpp-q4_0"
    dtype = "q4_0"


class LlamaCppQ4KMPeer(LlamaCppPeer):
    """4.5 to 6.6 bits a weight: Q4_K, and Q6_K for some of them; others where a row is no multiple of 256."""

    name = "llama.cpp-q4_k_m"
    dtype = "q4_k_m"
