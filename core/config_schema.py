"""Every setting VRAMancer has: its type, bounds, default, description, flag and environment variable.

Nothing is read here; `core.config` reads YAML, the environment and flags into these frozen models. The sample
`config.yaml`, the flags of the command line and their help are all generated from this file.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

KIB = 1024
MIB = 1024 * KIB

_TRUE = frozenset({"1", "true"})
_FALSE = frozenset({"0", "false"})


def _setting(
    default: Any,
    description: str,
    *,
    flag: str | None = None,
    env: str | None = None,
    shown_default: str | None = None,
    common: bool = False,
    **bounds: Any,
) -> Any:
    """A pydantic field; `flag` and `env` replace the names that are derived from the field's own.

    `flag=""` means that there is no flag; a callable `default` is a factory, shown as `shown_default` in help texts.
    What is `common` is in a command's `--help`, the rest in `--help-all` alone.
    """
    extra = {"flag": flag, "env": env, "shown_default": shown_default, "common": common}
    keywords: dict[str, Any] = {"description": description, "json_schema_extra": extra, **bounds}
    if callable(default):
        return Field(default_factory=default, **keywords)
    return Field(default=default, **keywords)


class Section(BaseModel):
    """A frozen group of settings. Text values (environment, flags) are read as what the field's type says."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = field_kinds(cls.model_fields[info.field_name or ""])
        if bool in kinds:
            return _read_bool(value)
        if value is False and "off" in typing.get_args(cls.model_fields[info.field_name or ""].annotation):
            return "off"  # what YAML reads as false
        if isinstance(value, bool):
            raise ValueError("Input should not be a boolean")  # noqa: TRY004 (pydantic reports ValueError only)
        if isinstance(value, str):
            if tuple in kinds:
                return tuple(part.strip() for part in value.split(",") if part.strip())
            if Path in kinds:
                return Path(value).expanduser()
        return value


def field_kinds(field: FieldInfo) -> tuple[Any, ...]:
    """The plain types that a field's annotation is made of: `int | None` gives `(int, NoneType)`."""
    annotation = field.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
    else:
        members = (annotation,)
    return tuple(typing.get_origin(member) or member for member in members)


def _read_bool(value: Any) -> bool:
    text = str(value).strip().lower()
    if isinstance(value, (bool, int, str)) and text in _TRUE | _FALSE:
        return text in _TRUE
    raise ValueError("Input should be 1, 0, true or false")


class ModelSettings(Section):
    """Which model is served, and how."""

    name: str | None = _setting(
        None,
        "Model to serve: a Hugging Face hub id or a directory holding config.json and safetensors. "
        "Not set: the demo model that comes with VRAMancer.",
        flag="model",
        min_length=1,
        common=True,
    )
    served_model_name: tuple[str, ...] = _setting((), "Further names under which clients may ask for the model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _setting(
        "auto", "Number format of weights and KV cache; auto takes the checkpoint's own.", common=True
    )
    max_model_len: int | None = _setting(
        None, "Longest prompt plus answer, in tokens. Not set: what the model was made for.", ge=1, common=True
    )
    revision: str | None = _setting(None, "Branch, tag or commit of a hub model.", min_length=1)
    chat_template: Path | None = _setting(None, "File with a Jinja chat template that replaces the model's own.")
    markup_in_messages: bool = _setting(
        False,
        "Special tokens that chat messages spell out, such as <|im_end|>, are special tokens. Off: they are text, and "
        "only the chat template writes special tokens.",
    )


class DeviceSettings(Section):
    """Which devices hold the model."""

    devices: str | None = _setting(
        None,
        'Devices and their memory limits, such as "cuda:0=24GiB,cuda:1=16GiB", "cpu=2GiB,cpu=1GiB" or '
        '"sim=24GiB@936GB/s/71TFLOPS" (an emulated card). Not set: whatever the machine has.',
        min_length=1,
        common=True,
    )
    num_gpus: int | None = _setting(None, "GPUs to use of those found. Not set: all of them.", ge=1, common=True)
    placement: str = _setting(
        "profiled",
        "How layers are split over the devices: profiled, for speed, by measurement; vram, by free memory; balanced, "
        "evenly; or a strategy of your own.",
        min_length=1,
        max_length=64,
        common=True,
    )
    layers: str | None = _setting(
        None, 'Layers on each device by hand, such as "20,12"; 0 leaves a device out.', min_length=1, max_length=1024
    )
    objective: Literal["throughput", "latency"] = _setting(
        "throughput",
        "What profiled placement makes best: throughput, the tokens per second of plan_streams streams together; "
        "latency, the time between two tokens of a stream.",
    )
    plan_streams: int = _setting(8, "Streams that the placement and its prediction reckon with.", ge=1, le=65536)
    plan_context: int = _setting(2048, "Tokens of context of each of these streams.", ge=1, le=1 << 24)
    profile_seconds: float = _setting(
        3.0, "Seconds to measure a device with, once per device and kind of model.", gt=0.0, le=600.0
    )
    sim_link: str | None = _setting(
        None,
        'Speed of the links between emulated devices, such as "11.6GB/s" or "11.6GB/s@30us". Not set: no delay.',
        min_length=1,
    )
    stream_weights: Literal["auto", "off"] = _setting(
        "auto",
        "Layers for which no device has room stay in main memory and are copied in for every step; off refuses models "
        "that do not fit.",
        common=True,
    )
    memory_fraction: float = _setting(
        0.9, "Share of a device's free memory to use where no limit is given (0 to 1).", gt=0.0, le=1.0
    )
    cpu_threads: int | None = _setting(
        None, "Threads that a CPU device computes with. Not set: chosen by torch.", ge=1, le=4096
    )


class EngineSettings(Section):
    """Batching, the KV cache and the circuit breaker."""

    max_batch_size: int = _setting(64, "Sequences that run at the same time.", ge=1, le=65536, common=True)
    max_num_batched_tokens: int = _setting(512, "Tokens computed in one step, over all sequences.", ge=1, le=1 << 20)
    prefill_chunk_size: int | None = _setting(
        None, "Prompt tokens of one request computed in one step. Not set: up to max_num_batched_tokens.", ge=1
    )
    cohorts: int | None = _setting(
        None,
        "Steps in flight at most, so that stages work at the same time; 1: one after the other. Not set: by "
        "prediction.",
        ge=1,
        le=64,
    )
    max_queue: int = _setting(
        256,
        "Sequences that may wait beside those that run, n or best_of for each prompt; further ones are answered 429.",
        ge=1,
        le=1 << 20,
    )
    max_queued_tokens: int = _setting(
        1 << 22,
        "Tokens of the prompts of all sequences that run and wait; further ones are answered 429. One prompt as long "
        "as the context always fits.",
        ge=1,
        le=1 << 32,
    )
    block_size: int = _setting(16, "Tokens per block of the KV cache.", ge=1, le=1024)
    kv_cache_tokens: int | None = _setting(
        None, "Size of the KV cache in tokens. Not set: as many as fit.", ge=1, common=True
    )
    enable_prefix_caching: bool = _setting(True, "Reuse the KV cache of prompts that begin alike.")
    native_kernels: bool = _setting(True, "Use the compiled CPU kernels where they can be built.")
    cpu_instructions: Literal["native", "avx2"] = _setting(
        "native",
        "Instructions that the CPU kernels are built with: native, all that this processor has; avx2, those of x86-64 "
        "processors before AVX-512, to compare.",
        env="VRM_CPU_INSTRUCTIONS",
    )
    breaker_failures: int = _setting(5, "Failed steps in a row after which requests are refused.", ge=1, le=1000)
    breaker_reset_s: float = _setting(10.0, "Seconds until refused requests are tried again.", gt=0.0, le=3600.0)


class LendingSettings(Section):
    """Memory that devices lend each other for KV blocks."""

    enabled: bool = _setting(True, "A device without room for KV blocks borrows from others.", flag="lending")
    lend_ratio: float = _setting(
        0.70, "Largest share of its memory that a GPU lends (0 to 1).", env="VRM_LEND_RATIO", ge=0.0, le=1.0
    )
    reclaim_threshold: float = _setting(
        0.80,
        "Share of its memory that a GPU uses itself at which it lends no more and takes back what it lent (0 to 1).",
        env="VRM_RECLAIM_THRESHOLD",
        gt=0.0,
        le=1.0,
    )
    host_bytes: int | None = _setting(
        None,
        "Bytes of main memory that take KV blocks when no GPU has room; 0 is none. Not set: a quarter of what is free.",
        flag="lending-host-bytes",
        ge=0,
    )
    extent_blocks: int = _setting(
        32, "Blocks that are borrowed and given back together.", flag="lending-extent-blocks", ge=1, le=65536
    )


class MemorySettings(Section):
    """Where blocks of KV go that have no place on a device: main memory, a directory, remote storage."""

    host_bytes: int | None = _setting(
        None,
        "Bytes of main memory for them; 0 keeps none, and nothing below it either. Not set: a tenth of the free main "
        "memory.",
        ge=0,
    )
    disk_path: Path | None = _setting(
        None,
        "Directory on a local disk for blocks that leave main memory; they are found again after a restart. One "
        "process uses it at a time. Not set: none.",
    )
    disk_bytes: int | None = _setting(
        None, "Largest size of all files there, in bytes. Not set: a tenth of the free space.", ge=1
    )
    disk_min_free_bytes: int = _setting(
        2048 * MIB, "Free space to leave on that disk, in bytes; below it nothing is written.", ge=0
    )
    disk_codec: Literal["auto", "none", "lz4", "zstd"] = _setting(
        "auto", "Compression on disk; auto measures on real blocks which one pays, if any."
    )
    remote_url: str | None = _setting(
        None,
        "Place for blocks that leave the disk: a url that fsspec reads, such as file:///mnt/share/kv or "
        "s3://bucket/kv. Other protocols than file need their own package. Not set: none.",
        min_length=1,
    )
    remote_bytes: int = _setting(64 * 1024 * MIB, "Largest size of all files there, in bytes.", ge=1)
    remote_codec: Literal["auto", "none", "lz4", "zstd"] = _setting("auto", "Compression there.")
    peer_codec: Literal["auto", "none", "lz4", "zstd"] = _setting("auto", "Compression in other nodes' memory.")
    kv_quantization: Literal["none", "int8", "fp8"] = _setting(
        "none",
        "Store blocks below main memory in one byte per number. Halves their size and changes the numbers slightly, so "
        "that restored prompts may be continued with other tokens.",
    )
    half_life_s: float = _setting(
        600.0, "Seconds after which a use of a block counts half.", flag="kv-half-life-s", gt=0.0, le=1e7
    )
    write_back_bytes_s: float | None = _setting(
        256.0 * MIB, "Bytes per second written below main memory while serving. null: no limit.", gt=0.0
    )
    max_queued_writes: int = _setting(
        256, "Blocks that may wait to be written; colder ones are given up.", ge=1, le=1 << 20
    )


class ApiSettings(Section):
    """Where and how the HTTP API listens."""

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 is every interface.", min_length=1, common=True)
    port: int = _setting(5000, "Port of the API.", ge=0, le=65535, common=True)
    metrics_port: int = _setting(
        9108,
        "Port of a second listener for Prometheus metrics; 0 is none. Not set: 9108, or the next free one.",
        env="VRM_METRICS_PORT",
        ge=0,
        le=65535,
        common=True,
    )
    token: SecretStr | None = _setting(
        None, "Token that clients send. Not set: one is generated and kept in token_file.", flag=""
    )
    token_file: Path | None = _setting(
        None, "File that keeps the generated token. Not set: api-token in runtime.state_dir."
    )
    max_body_bytes: int = _setting(10 * MIB, "Largest request body, in bytes.", ge=KIB, le=1024 * MIB)
    max_batch_prompts: int = _setting(256, "Most prompts in one batch request.", ge=1, le=65536)
    threads: int | None = _setting(
        None,
        "Requests that may be under way at a time; each takes a thread. Not set: as many as run and wait in the "
        "engine, and some more.",
        ge=2,
        le=16384,
    )
    max_connections: int = _setting(
        4096, "Open connections; beyond, the one that has been idle longest is closed.", ge=16, le=1 << 20
    )
    header_timeout_s: float = _setting(10.0, "Seconds for a request's head to come in.", gt=0.0, le=3600.0)
    body_timeout_s: float = _setting(120.0, "Seconds for a request's body to come in.", gt=0.0, le=86400.0)
    write_timeout_s: float = _setting(
        30.0,
        "Seconds for a client to take some of what is waiting for it, before it counts as gone.",
        gt=0.0,
        le=86400.0,
    )
    keepalive_comment_s: float = _setting(
        15.0, "Seconds of silence in a stream after which a comment line keeps it open.", gt=0.0, le=3600.0
    )
    cors_origins: tuple[str, ...] = _setting((), "Web origins whose pages may call the API.")
    drain_timeout_s: float = _setting(
        30.0, "Seconds that running requests are given to finish at shutdown.", ge=0.0, le=86400.0
    )


class SecuritySettings(Section):
    """How strict the server is."""

    production: bool = _setting(
        False, "Strict mode: refuses to start on a weak setting.", env="VRM_PRODUCTION", common=True
    )
    read_only: bool = _setting(False, "Refuse every request that would change something.", env="VRM_READ_ONLY")
    requests_per_minute: int = _setting(
        30_000, "Requests that one key may send in a minute; further ones are answered 429.", ge=1, le=10**9
    )
    disable_rate_limit: bool = _setting(
        False, "No rate limiting, of keys or of wrong tokens.", env="VRM_DISABLE_RATE_LIMIT"
    )


class MonitoringSettings(Section):
    """How the server watches its devices."""

    interval_s: float = _setting(
        2.0,
        "Seconds between two readings of the devices (memory, utilisation, temperature).",
        ge=0.1,
        le=3600.0,
        flag="monitoring-interval-s",
    )


class DashboardSettings(Section):
    """The dashboard for browsers: at /dashboard of the API, or alone by `vramancer dashboard --web`."""

    enabled: bool = _setting(True, "Serve the dashboard at /dashboard of the API.", flag="dashboard")
    host: str = _setting(
        "127.0.0.1", "Address that a dashboard listens on that is served alone.", flag="dashboard-host", min_length=1
    )
    port: int = _setting(5050, "Port of a dashboard that is served alone.", flag="dashboard-port", ge=0, le=65535)
    max_viewers: int = _setting(
        64, "Pages that may watch at a time; further ones are answered 429.", flag="dashboard-viewers", ge=1, le=4096
    )
    session_hours: float = _setting(
        12.0,
        "Hours after which a browser that was not used has to sign in again.",
        flag="session-hours",
        gt=0.0,
        le=720.0,
    )
    origins: tuple[str, ...] = _setting(
        (),
        "Addresses under which browsers reach the dashboard behind a proxy that passes another Host on, such as "
        "https://gpu.example.",
        flag="dashboard-origins",
    )
    prometheus_url: str | None = _setting(
        None,
        "Prometheus whose firing alerts the dashboard shows, such as http://127.0.0.1:9090; the server asks it. Not "
        "set: none.",
        env="VRM_PROMETHEUS_URL",
        pattern=r"^https?://[^\s/]+",
    )


class TracingSettings(Section):
    """OpenTelemetry traces of requests and background work."""

    enabled: bool = _setting(
        False,
        "Send traces of requests over OTLP and HTTP; needs pip install 'vramancer[tracing]'. OpenTelemetry's own "
        "variables hold, such as OTEL_EXPORTER_OTLP_ENDPOINT, which is http://localhost:4318 if it is not set.",
        flag="tracing",
        env="VRM_TRACING",
    )
    sample_ratio: float = _setting(
        1.0,
        "Share of requests that are traced (0 to 1), where the caller's traceparent header does not say whether to.",
        flag="tracing-sample-ratio",
        ge=0.0,
        le=1.0,
    )


class LoggingSettings(Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "Least severe level logged.", flag="log-level", common=True
    )
    json_output: bool = _setting(False, "One JSON object per log line.", flag="log-json", env="VRM_LOG_JSON")


class RuntimeSettings(Section):
    """Test modes and where files are kept."""

    minimal_test: bool = _setting(
        False,
        "Test mode: the demo model on two logical CPU devices, where nothing else is asked for.",
        env="VRM_MINIMAL_TEST",
    )
    test_mode: bool = _setting(False, "Test conveniences: requests that give no seed get seed 0.", env="VRM_TEST_MODE")
    default_seed: int | None = _setting(
        None, "Seed of requests that give none. Not set: a different one each time.", ge=0, le=2**63 - 1
    )
    cache_dir: Path = _setting(
        lambda: Path("~/.cache/vramancer").expanduser(),
        "Directory for what can be made again: compiled kernels, measurements.",
        shown_default="~/.cache/vramancer",
    )
    state_dir: Path = _setting(
        lambda: Path("~/.local/state/vramancer").expanduser(),
        "Directory for what must be kept: the generated token.",
        shown_default="~/.local/state/vramancer",
    )


class Settings(BaseModel):
    """All settings, frozen. Made by `core.config.load_settings`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelSettings = Field(default_factory=ModelSettings)
    devices: DeviceSettings = Field(default_factory=DeviceSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    lending: LendingSettings = Field(default_factory=LendingSettings)
    memory: MemorySettings = Field(default_factory=MemorySettings)
    api: ApiSettings = Field(default_factory=ApiSettings)
    security: SecuritySettings = Field(default_factory=SecuritySettings)
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
        if self.security.production:
            self._check_production()
        return self

    def _check_production(self) -> None:
        """Production mode takes no bypass."""
        for weak, key in (
            (self.security.disable_rate_limit, "security.disable_rate_limit"),
            (self.runtime.minimal_test, "runtime.minimal_test"),
            (self.runtime.test_mode, "runtime.test_mode"),
            ("*" in self.api.cors_origins, 'api.cors_origins="*"'),
        ):
            if weak:
                raise ValueError(f"{key} is not allowed together with security.production")
