"""Settings of backends beside our engine: other servers that answer for models, and the stub."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from core.config_fields import MIB, Section, setting

BackendKind = Literal["auto", "openai", "vllm", "ollama", "llama.cpp", "vramancer"]
SELF = "self"
"""Instead of an address: the model that this server has loaded itself."""


class UpstreamSettings(BaseModel):
    """One server that answers for the model `name`; several of one name are its replicas.

    `url` is where its OpenAI-compatible routes are, with or without `/v1`; `self` is the model that is loaded here.
    `model` is what the model is called there; None: the same, or the only one that it has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=256)
    url: str = Field(min_length=1, max_length=2048)
    backend: BackendKind = "auto"
    model: str | None = Field(None, min_length=1, max_length=4096)
    api_key: SecretStr | None = Field(None, min_length=1, max_length=4096)

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, value: Any) -> Any:
        """`NAME=URL`, as the environment and flags have it."""
        if not isinstance(value, str):
            return value
        name, found, url = value.partition("=")
        if not found:
            raise ValueError("write NAME=URL, such as qwen=http://gpu2:8000/v1")
        return {"name": name.strip(), "url": url.strip()}

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if url == SELF:
            return url
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            usable = False
        if not usable or not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("a url begins with http:// or https:// and a host, or is the word self")
        if parts.username is not None or parts.password is not None:
            raise ValueError("a url has no user and password in it; api_key is the place for a secret")
        if parts.query or parts.fragment:
            raise ValueError("a url ends with its path; it has no ? or #")
        path = parts.path.rstrip("/") or "/v1"
        return f"{parts.scheme}://{parts.netloc}{path}"

    @field_validator("api_key")
    @classmethod
    def _check_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None:
            check_key(key.get_secret_value())
        return key


def check_key(text: str) -> None:
    """Raise `ValueError` for what cannot stand in a header."""
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("a key is printable ASCII without spaces")


class BackendSettings(Section):
    """Backends beside our own engine: other servers that answer for models."""

    upstreams: tuple[UpstreamSettings, ...] = setting(
        (),
        "Other servers whose models are served beside ours, as NAME=URL. In this file also mappings of name, url, "
        "backend (auto, openai, vllm, ollama, llama.cpp or vramancer), model (its name there) and api_key. Several of "
        'one name are replicas; the url "self" is the model loaded here.',
        flag="upstreams",
        holds_secrets=True,
    )
    upstream_keys: SecretStr | None = setting(
        None, "API keys of these servers, as NAME=KEY, for all replicas of NAME that have none. Not set: none.", flag=""
    )
    connect_timeout_s: float = setting(
        5.0, "Seconds for an upstream to take a connection.", flag="upstream-connect-timeout-s", gt=0.0, le=600.0
    )
    read_timeout_s: float = setting(
        300.0,
        "Seconds of silence of an upstream, before and within an answer, after which it counts as lost.",
        flag="upstream-read-timeout-s",
        gt=0.0,
        le=86400.0,
    )
    total_timeout_s: float = setting(
        3600.0, "Seconds that an answer of an upstream may take in all.", flag="upstream-timeout-s", gt=0.0, le=86400.0
    )
    max_answer_bytes: int = setting(
        64 * MIB, "Largest answer of an upstream that is not streamed, in bytes.", flag="upstream-max-answer-bytes",
        ge=1024, le=4096 * MIB,
    )  # fmt: skip
    breaker_failures: int = setting(
        3, "Calls in a row that fail after which an upstream is not asked for a while.",
        flag="upstream-breaker-failures", ge=1, le=1000,
    )  # fmt: skip
    breaker_reset_s: float = setting(
        10.0, "Seconds until it is tried again, with one call.", flag="upstream-breaker-reset-s", gt=0.0, le=3600.0
    )
    probe_interval_s: float = setting(
        10.0, "Seconds between two looks at whether upstreams are there.", flag="upstream-probe-interval-s",
        ge=0.1, le=3600.0,
    )  # fmt: skip
    allow_stub: bool = setting(
        False, "Where no model can be loaded and there is no upstream, answer from a stub that says that it is one."
    )

    @field_validator("upstream_keys")
    @classmethod
    def _check_keys(cls, keys: SecretStr | None) -> SecretStr | None:
        _read_keys(keys)
        return keys

    @model_validator(mode="after")
    def _check_together(self) -> BackendSettings:
        seen: set[tuple[str, str, str | None]] = set()
        for upstream in self.upstreams:
            key = (upstream.name, upstream.url, upstream.model)
            if key in seen:
                raise ValueError(f"backend.upstreams has {upstream.name!r} at {upstream.url} twice")
            seen.add(key)
        unknown = sorted(_read_keys(self.upstream_keys).keys() - {upstream.name for upstream in self.upstreams})
        if unknown:
            raise ValueError(f"backend.upstream_keys has a key for {unknown[0]!r}, which backend.upstreams has not")
        return self

    def key_of(self, upstream: UpstreamSettings) -> str | None:
        """What to show this server, if anything."""
        if upstream.api_key is not None:
            return upstream.api_key.get_secret_value()
        return _read_keys(self.upstream_keys).get(upstream.name)


def _read_keys(text: SecretStr | None) -> dict[str, str]:
    keys = {}
    for part in (text.get_secret_value() if text is not None else "").split(","):
        if part.strip():
            name, found, key = part.partition("=")
            if not found or not name.strip() or not key.strip():
                raise ValueError("write NAME=KEY, and commas between them")
            check_key(key.strip())
            keys[name.strip()] = key.strip()
    return keys
