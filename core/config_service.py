"""Settings of the service around the engine: where it listens, who may use it, how it is watched, what it logs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from core.config_fields import KIB, MIB, Section, setting


class ApiSettings(Section):
    """Where and how the HTTP API listens."""

    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 is every interface.", min_length=1, common=True)
    port: int = setting(5000, "Port of the API.", ge=0, le=65535, common=True)
    metrics_port: int = setting(
        9108,
        "Port of a second listener for Prometheus metrics; 0 is none. Not set: 9108, or the next free one.",
        env="VRM_METRICS_PORT",
        ge=0,
        le=65535,
        common=True,
    )
    token: SecretStr | None = setting(
        None, "Token that clients send. Not set: one is generated and kept in token_file.", flag=""
    )
    token_file: Path | None = setting(
        None, "File that keeps the generated token. Not set: api-token in runtime.state_dir."
    )
    max_body_bytes: int = setting(10 * MIB, "Largest request body, in bytes.", ge=KIB, le=1024 * MIB)
    max_batch_prompts: int = setting(256, "Most prompts in one batch request.", ge=1, le=65536)
    threads: int | None = setting(
        None,
        "Requests that may be under way at a time; each takes a thread. Not set: as many as run and wait in the "
        "engine, and some more.",
        ge=2,
        le=16384,
    )
    max_connections: int = setting(
        4096, "Open connections; beyond, the one that has been idle longest is closed.", ge=16, le=1 << 20
    )
    header_timeout_s: float = setting(10.0, "Seconds for a request's head to come in.", gt=0.0, le=3600.0)
    body_timeout_s: float = setting(120.0, "Seconds for a request's body to come in.", gt=0.0, le=86400.0)
    write_timeout_s: float = setting(
        30.0,
        "Seconds for a client to take some of what is waiting for it, before it counts as gone.",
        gt=0.0,
        le=86400.0,
    )
    keepalive_comment_s: float = setting(
        15.0, "Seconds of silence in a stream after which a comment line keeps it open.", gt=0.0, le=3600.0
    )
    cors_origins: tuple[str, ...] = setting((), "Web origins whose pages may call the API.")
    drain_timeout_s: float = setting(
        30.0, "Seconds that running requests are given to finish at shutdown.", ge=0.0, le=86400.0
    )


class SecuritySettings(Section):
    """How strict the server is."""

    production: bool = setting(
        False, "Strict mode: refuses to start on a weak setting.", env="VRM_PRODUCTION", common=True
    )
    read_only: bool = setting(False, "Refuse every request that would change something.", env="VRM_READ_ONLY")
    requests_per_minute: int = setting(
        30_000, "Requests that one key may send in a minute; further ones are answered 429.", ge=1, le=10**9
    )
    disable_rate_limit: bool = setting(
        False, "No rate limiting, of keys or of wrong tokens.", env="VRM_DISABLE_RATE_LIMIT"
    )


class ClusterSettings(Section):
    """Several machines that serve one model: a master, which has the API, and workers."""

    accept: bool = setting(
        False, "Accept workers on other machines, which prove that they know the cluster's token.",
        flag="cluster-master", common=True,
    )  # fmt: skip
    auto_place: bool = setting(
        False, "Move the model onto machines that join, at a quiet moment, where that makes it faster.",
        flag="auto-place", common=True,
    )  # fmt: skip
    master: str | None = setting(
        None,
        "The master that a worker joins, host:port. Not set: it is looked for on the network.",
        env="VRM_CLUSTER_MASTER",
        flag="master",
        common=True,
        pattern=r"^(\[[0-9A-Fa-f:.%]+\]|[^\s:]+):[0-9]{1,5}$",
    )
    port: int = setting(
        5040, "Port on which a master accepts workers (TCP), and is found (UDP).", env="VRM_CLUSTER_PORT",
        flag="cluster-port", ge=0, le=65535,
    )  # fmt: skip
    worker_port: int = setting(
        5041, "Port on which a worker takes what other workers send; 0 is any. Not set: 5041, or the next free one.",
        flag="cluster-worker-port", ge=0, le=65535,
    )  # fmt: skip
    interface: str | None = setting(
        None,
        "Network interface for the cluster, such as eth0, or an address of this machine. Not set: the one that other "
        "networks are reached by.",
        flag="cluster-interface",
        min_length=1,
    )
    name: str | None = setting(
        None, "What this machine is called in the cluster. Not set: its host name.", flag="cluster-name",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,62}$",
    )  # fmt: skip
    memory_bytes: int = setting(
        0,
        "Bytes of a worker's main memory in which the master may keep blocks of KV (tier L4). They are as private as "
        "the prompts they were computed from, and cross the network.",
        flag="cluster-memory-bytes", ge=0,
    )  # fmt: skip
    token: SecretStr | None = setting(
        None, "The secret that the nodes of a cluster share. Not set: a master makes one and keeps it in token_file.",
        env="VRM_CLUSTER_TOKEN", flag="",
    )  # fmt: skip
    token_file: Path | None = setting(
        None, "File that keeps the generated secret. Not set: cluster-token in runtime.state_dir.",
        flag="cluster-token-file",
    )  # fmt: skip
    tls: bool = setting(
        False, "Encrypt the connections between nodes (TLS 1.3), on all of them or none. Needs pip install "
        "'vramancer[tls]'.", flag="cluster-tls",
    )  # fmt: skip
    silence_s: float = setting(
        1.5, "Seconds after which a node that says nothing counts as gone.", flag="cluster-silence-s", ge=0.5, le=3600.0
    )
    wait_s: float = setting(
        120.0,
        "Seconds that running requests wait for a node where the others cannot hold the model.",
        flag="cluster-wait-s",
        ge=0.0,
        le=86400.0,
    )


class MonitoringSettings(Section):
    """How the server watches its devices."""

    interval_s: float = setting(
        2.0,
        "Seconds between two readings of the devices (memory, utilisation, temperature).",
        ge=0.1,
        le=3600.0,
        flag="monitoring-interval-s",
    )


class DashboardSettings(Section):
    """The dashboard for browsers: at /dashboard of the API, or alone by `vramancer dashboard --web`."""

    enabled: bool = setting(True, "Serve the dashboard at /dashboard of the API.", flag="dashboard")
    host: str = setting(
        "127.0.0.1", "Address that a dashboard listens on that is served alone.", flag="dashboard-host", min_length=1
    )
    port: int = setting(5050, "Port of a dashboard that is served alone.", flag="dashboard-port", ge=0, le=65535)
    max_viewers: int = setting(
        64, "Pages that may watch at a time; further ones are answered 429.", flag="dashboard-viewers", ge=1, le=4096
    )
    session_hours: float = setting(
        12.0,
        "Hours after which a browser that was not used has to sign in again.",
        flag="session-hours",
        gt=0.0,
        le=720.0,
    )
    origins: tuple[str, ...] = setting(
        (),
        "Addresses under which browsers reach the dashboard behind a proxy that passes another Host on, such as "
        "https://gpu.example.",
        flag="dashboard-origins",
    )
    prometheus_url: str | None = setting(
        None,
        "Prometheus whose firing alerts the dashboard shows, such as http://127.0.0.1:9090; the server asks it. Not "
        "set: none.",
        env="VRM_PROMETHEUS_URL",
        pattern=r"^https?://[^\s/]+",
    )


class TracingSettings(Section):
    """OpenTelemetry traces of requests and background work."""

    enabled: bool = setting(
        False,
        "Send traces of requests over OTLP and HTTP; needs pip install 'vramancer[tracing]'. OpenTelemetry's own "
        "variables hold, such as OTEL_EXPORTER_OTLP_ENDPOINT, which is http://localhost:4318 if it is not set.",
        flag="tracing",
        env="VRM_TRACING",
    )
    sample_ratio: float = setting(
        1.0,
        "Share of requests that are traced (0 to 1), where the caller's traceparent header does not say whether to.",
        flag="tracing-sample-ratio",
        ge=0.0,
        le=1.0,
    )


class LoggingSettings(Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Least severe level logged.", flag="log-level", common=True
    )
    json_output: bool = setting(False, "One JSON object per log line.", flag="log-json", env="VRM_LOG_JSON")


class RuntimeSettings(Section):
    """Test modes and where files are kept."""

    minimal_test: bool = setting(
        False,
        "Test mode: the demo model on two logical CPU devices, where nothing else is asked for.",
        env="VRM_MINIMAL_TEST",
    )
    test_mode: bool = setting(False, "Test conveniences: requests that give no seed get seed 0.", env="VRM_TEST_MODE")
    default_seed: int | None = setting(
        None, "Seed of requests that give none. Not set: a different one each time.", ge=0, le=2**63 - 1
    )
    cache_dir: Path = setting(
        lambda: Path("~/.cache/vramancer").expanduser(),
        "Directory for what can be made again: compiled kernels, measurements.",
        shown_default="~/.cache/vramancer",
    )
    state_dir: Path = setting(
        lambda: Path("~/.local/state/vramancer").expanduser(),
        "Directory for what must be kept: the generated token.",
        shown_default="~/.local/state/vramancer",
    )
