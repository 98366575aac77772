"""Every setting VRAMancer has. Those of the engine are here, those of the service in `core.config_service`.

Nothing is read here; `core.config` reads YAML, the environment and flags into these frozen models. The sample
`config.yaml`, the flags of the command line and their help are all generated from these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.config_backend import BackendSettings
from core.config_fields import MIB, Section, setting
from core.config_service import (
    ApiSettings,
    ClusterSettings,
    DashboardSettings,
    LoggingSettings,
    MonitoringSettings,
    RuntimeSettings,
    SecuritySettings,
    TracingSettings,
)
from core.defaults import NO_MODEL
from core.parsers.families import ReasoningParserName, ToolParserName


class ModelSettings(Section):
    """Which model is served, and how."""

    name: str | None = setting(
        None,
        "Model to serve: a Hugging Face hub id or a directory holding config.json and safetensors. "
        "Not set: the demo model that comes with VRAMancer; none: no model here, for other servers' alone.",
        flag="model",
        min_length=1,
        common=True,
    )
    served_model_name: tuple[str, ...] = setting((), "Further names under which clients may ask for the model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Number format of weights and KV cache; auto takes the checkpoint's own.", common=True
    )
    quantize: Literal["none", "int8", "int4"] = setting(
        "none",
        "Quantize the weights of a plain checkpoint's linear layers while they are loaded: int8, rounded to nearest, "
        "or int4, by a search without calibration. Checkpoints that are quantized already are refused with it.",
        common=True,
    )
    quantize_group: Literal[32, 64, 128, 256] | None = setting(
        None, "Columns of a weight that share a scale. Not set: 128 for int8, 64 for int4."
    )
    quantize_keep: tuple[str, ...] = setting(
        ("head",),
        "Linear layers that are not quantized: patterns of their names, such as down_proj or model.layers.0.*; head is "
        "the output layer. Embeddings, norms and the routers of experts never are.",
    )
    max_model_len: int | None = setting(
        None, "Longest prompt plus answer, in tokens. Not set: what the model was made for.", ge=1, common=True
    )
    revision: str | None = setting(None, "Branch, tag or commit of a hub model.", min_length=1)
    chat_template: Path | None = setting(None, "File with a Jinja chat template that replaces the model's own.")
    markup_in_messages: bool = setting(
        False,
        "Special tokens that chat messages spell out, such as <|im_end|>, are special tokens. Off: they are text, and "
        "only the chat template writes special tokens.",
    )
    tool_parser: ToolParserName = setting(
        "auto",
        "How the model writes tool calls; auto recognises it by its chat template and special tokens, none reads no "
        "calls.",
    )
    reasoning_parser: ReasoningParserName = setting(
        "auto", "How the model marks its thoughts; auto recognises it like tool_parser, none leaves them in the answer."
    )


class DeviceSettings(Section):
    """Which devices hold the model."""

    devices: str | None = setting(
        None,
        'Devices and their memory limits, such as "cuda:0=24GiB,cuda:1=16GiB", "cpu=2GiB,cpu=1GiB" or '
        '"sim=24GiB@936GB/s/71TFLOPS" (an emulated card). Not set: whatever the machine has.',
        min_length=1,
        common=True,
    )
    num_gpus: int | None = setting(None, "GPUs to use of those found. Not set: all of them.", ge=1, common=True)
    placement: str = setting(
        "profiled",
        "How layers are split over the devices: profiled, for speed, by measurement; vram, by free memory; balanced, "
        "evenly; or a strategy of your own.",
        min_length=1,
        max_length=64,
        common=True,
    )
    layers: str | None = setting(
        None, 'Layers on each device by hand, such as "20,12"; 0 leaves a device out.', min_length=1, max_length=1024
    )
    objective: Literal["throughput", "latency"] = setting(
        "throughput",
        "What profiled placement makes best: throughput, the tokens per second of plan_streams streams together; "
        "latency, the time between two tokens of a stream.",
    )
    plan_streams: int = setting(8, "Streams that the placement and its prediction reckon with.", ge=1, le=65536)
    plan_context: int = setting(2048, "Tokens of context of each of these streams.", ge=1, le=1 << 24)
    profile_seconds: float = setting(
        3.0, "Seconds to measure a device with, once per device and kind of model.", gt=0.0, le=600.0
    )
    sim_link: str | None = setting(
        None,
        'Speed of the links between emulated devices, such as "11.6GB/s" or "11.6GB/s@30us". Not set: no delay.',
        min_length=1,
    )
    stream_weights: Literal["auto", "off"] = setting(
        "auto",
        "Layers for which no device has room stay in main memory and are copied in for every step; off refuses models "
        "that do not fit.",
        common=True,
    )
    memory_fraction: float = setting(
        0.9, "Share of a device's free memory to use where no limit is given (0 to 1).", gt=0.0, le=1.0
    )
    cpu_threads: int | None = setting(
        None, "Threads that a CPU device computes with. Not set: chosen by torch.", ge=1, le=4096
    )


class EngineSettings(Section):
    """Batching, the KV cache and the circuit breaker."""

    max_batch_size: int = setting(64, "Sequences that run at the same time.", ge=1, le=65536, common=True)
    max_num_batched_tokens: int = setting(512, "Tokens computed in one step, over all sequences.", ge=1, le=1 << 20)
    prefill_chunk_size: int | None = setting(
        None, "Prompt tokens of one request computed in one step. Not set: up to max_num_batched_tokens.", ge=1
    )
    cohorts: int | None = setting(
        None,
        "Steps in flight at most, so that stages work at the same time; 1: one after the other. Not set: by "
        "prediction.",
        ge=1,
        le=64,
    )
    max_queue: int = setting(
        256,
        "Sequences that may wait beside those that run, n or best_of for each prompt; further ones are answered 429.",
        ge=1,
        le=1 << 20,
    )
    max_queued_tokens: int = setting(
        1 << 22,
        "Tokens of the prompts of all sequences that run and wait; further ones are answered 429. One prompt as long "
        "as the context always fits.",
        ge=1,
        le=1 << 32,
    )
    block_size: int = setting(16, "Tokens per block of the KV cache.", ge=1, le=1024)
    kv_cache_tokens: int | None = setting(
        None, "Size of the KV cache in tokens. Not set: as many as fit.", ge=1, common=True
    )
    enable_prefix_caching: bool = setting(True, "Reuse the KV cache of prompts that begin alike.")
    native_kernels: bool = setting(True, "Use the compiled CPU kernels where they can be built.")
    cpu_instructions: Literal["native", "avx512", "avx2"] = setting(
        "native",
        "Instructions that the CPU kernels are built with: native, all that this processor has; avx512 and avx2, those "
        "of x86-64 processors before AMX and before AVX-512, to compare.",
        env="VRM_CPU_INSTRUCTIONS",
    )
    breaker_failures: int = setting(5, "Failed steps in a row after which requests are refused.", ge=1, le=1000)
    breaker_reset_s: float = setting(10.0, "Seconds until refused requests are tried again.", gt=0.0, le=3600.0)


class EmbeddingSettings(Section):
    """Models for embeddings and reranking, served beside the chat model."""

    model: str | None = setting(
        None,
        "Embedding model: a Hugging Face hub id or a directory; none has the chat model's own hidden states. Not set: "
        "the bundled one beside the demo model, else none.",
        flag="embedding-model",
        min_length=1,
    )
    reranker: str | None = setting(
        None,
        "Model that scores pairs of texts, with one label, for /v1/rerank and /v1/score. Not set: embeddings are "
        "compared.",
        flag="reranker-model",
        min_length=1,
    )
    device: str = setting(
        "cpu",
        'Device that they compute on, with a limit if wanted, such as "cuda:0=2GiB".',
        flag="embedding-device",
        min_length=1,
        max_length=256,
    )
    max_batch_tokens: int = setting(
        2048, "Tokens of one batch, padding included.", flag="embedding-batch-tokens", ge=1, le=1 << 20
    )
    max_queue: int = setting(
        4096, "Inputs that may wait for each of them; further ones are answered 429.", flag="embedding-max-queue",
        ge=1, le=1 << 20,
    )  # fmt: skip
    max_queued_tokens: int = setting(
        1 << 21, "Tokens of all inputs that wait; further ones are answered 429.", flag="embedding-max-queued-tokens",
        ge=1, le=1 << 32,
    )  # fmt: skip


class LendingSettings(Section):
    """Memory that devices lend each other for KV blocks."""

    enabled: bool = setting(True, "A device without room for KV blocks borrows from others.", flag="lending")
    lend_ratio: float = setting(
        0.70, "Largest share of its memory that a GPU lends (0 to 1).", env="VRM_LEND_RATIO", ge=0.0, le=1.0
    )
    reclaim_threshold: float = setting(
        0.80,
        "Share of its memory that a GPU uses itself at which it lends no more and takes back what it lent (0 to 1).",
        env="VRM_RECLAIM_THRESHOLD",
        gt=0.0,
        le=1.0,
    )
    host_bytes: int | None = setting(
        None,
        "Bytes of main memory that take KV blocks when no GPU has room; 0 is none. Not set: a quarter of what is free.",
        flag="lending-host-bytes",
        ge=0,
    )
    between_machines: bool = setting(
        True,
        "Devices also lend to stages on other machines of a cluster, where attention over the network costs less than "
        "fetching KV or computing it again.",
        flag="lending-between-machines",
    )
    extent_blocks: int = setting(
        32, "Blocks that are borrowed and given back together.", flag="lending-extent-blocks", ge=1, le=65536
    )


class MemorySettings(Section):
    """Where blocks of KV go that have no place on a device: main memory, a directory, remote storage."""

    host_bytes: int | None = setting(
        None,
        "Bytes of main memory for them; 0 keeps none, and nothing below it either. Not set: a tenth of the free main "
        "memory.",
        ge=0,
    )
    disk_path: Path | None = setting(
        None,
        "Directory on a local disk for blocks that leave main memory; they are found again after a restart. One "
        "process uses it at a time. Not set: none.",
    )
    disk_bytes: int | None = setting(
        None, "Largest size of all files there, in bytes. Not set: a tenth of the free space.", ge=1
    )
    disk_min_free_bytes: int = setting(
        2048 * MIB, "Free space to leave on that disk, in bytes; below it nothing is written.", ge=0
    )
    disk_codec: Literal["auto", "none", "lz4", "zstd"] = setting(
        "auto", "Compression on disk; auto measures on real blocks which one pays, if any."
    )
    remote_url: str | None = setting(
        None,
        "Place for blocks that leave the disk: a url that fsspec reads, such as file:///mnt/share/kv or "
        "s3://bucket/kv. Other protocols than file need their own package. Not set: none.",
        min_length=1,
    )
    remote_bytes: int = setting(64 * 1024 * MIB, "Largest size of all files there, in bytes.", ge=1)
    remote_codec: Literal["auto", "none", "lz4", "zstd"] = setting("auto", "Compression there.")
    peer_codec: Literal["auto", "none", "lz4", "zstd"] = setting("auto", "Compression in other nodes' memory.")
    kv_quantization: Literal["none", "int8", "fp8"] = setting(
        "none",
        "Store blocks below main memory in one byte per number. Halves their size and changes the numbers slightly, so "
        "that restored prompts may be continued with other tokens.",
    )
    half_life_s: float = setting(
        600.0, "Seconds after which a use of a block counts half.", flag="kv-half-life-s", gt=0.0, le=1e7
    )
    write_back_bytes_s: float | None = setting(
        256.0 * MIB, "Bytes per second written below main memory while serving. null: no limit.", gt=0.0
    )
    max_queued_writes: int = setting(
        256, "Blocks that may wait to be written; colder ones are given up.", ge=1, le=1 << 20
    )


class Settings(BaseModel):
    """All settings, frozen. Made by `core.config.load_settings`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelSettings = Field(default_factory=ModelSettings)
    devices: DeviceSettings = Field(default_factory=DeviceSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    embeddings: EmbeddingSettings = Field(default_factory=EmbeddingSettings)
    lending: LendingSettings = Field(default_factory=LendingSettings)
    memory: MemorySettings = Field(default_factory=MemorySettings)
    backend: BackendSettings = Field(default_factory=BackendSettings)
    api: ApiSettings = Field(default_factory=ApiSettings)
    security: SecuritySettings = Field(default_factory=SecuritySettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    monitoring: MonitoringSettings = Field(default_factory=MonitoringSettings)
    dashboard: DashboardSettings = Field(default_factory=DashboardSettings)
    tracing: TracingSettings = Field(default_factory=TracingSettings)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    runtime: RuntimeSettings = Field(default_factory=RuntimeSettings)

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if self.api.metrics_port and self.api.metrics_port == self.api.port:
            raise ValueError(f"api.metrics_port must differ from api.port, both are {self.api.port}")
        chunk, budget = self.engine.prefill_chunk_size, self.engine.max_num_batched_tokens
        if chunk is not None and chunk > budget:
            raise ValueError(f"engine.prefill_chunk_size ({chunk}) must not exceed max_num_batched_tokens ({budget})")
        others = self.backend.upstreams or self.embeddings.reranker or self.embeddings.model not in (None, NO_MODEL)
        if self.model.name == NO_MODEL and not others:
            raise ValueError(
                f"model.name {NO_MODEL} leaves nothing to serve: backend.upstreams, embeddings.model or "
                "embeddings.reranker has to name something"
            )
        if self.security.production:
            self._check_production()
        return self

    def _check_production(self) -> None:
        """Production mode takes no bypass."""
        for weak, key in (
            (self.security.disable_rate_limit, "security.disable_rate_limit"),
            (self.runtime.minimal_test, "runtime.minimal_test"),
            (self.runtime.test_mode, "runtime.test_mode"),
            (self.backend.allow_stub, "backend.allow_stub"),
            ("*" in self.api.cors_origins, 'api.cors_origins="*"'),
        ):
            if weak:
                raise ValueError(f"{key} is not allowed together with security.production")
