"""Which encoders are served beside the chat model: opened once, on their own device, closed with the server."""

from __future__ import annotations

import torch

from core.config import Settings
from core.config_schema import DeviceSettings
from core.defaults import DEMO_EMBEDDING_NAME, DEMO_NAME, NO_MODEL
from core.devices import DeviceBudget, MainMemory, format_bytes, open_devices
from core.embedding.engine import EncoderEngine
from core.embedding.loading import Kind, load_encoder
from core.errors import ConfigError, VRAMancerError
from core.logs import get_logger
from core.models.resolve import resolve_model

logger = get_logger(__name__)


class Encoders:
    """The embedding model and the reranker, each if there is one."""

    def __init__(self, settings: Settings, main_memory: MainMemory) -> None:
        self.embedding: EncoderEngine | None = None
        self.reranker: EncoderEngine | None = None
        self._settings = settings
        self._main_memory = main_memory
        self._opened = False

    def open(self) -> None:
        """Load what the settings name; with no embedding model named and the demo model served, the bundled one. Does
        nothing when called again. Raises the `ModelError` family, `DeviceError` and `ConfigError`; then none is open.
        """
        if self._opened:
            return
        settings = self._settings.embeddings
        name = settings.model
        if name is None and self._settings.model.name in (None, DEMO_NAME):
            name = DEMO_EMBEDDING_NAME
        try:
            if name not in (None, NO_MODEL):
                self.embedding = self._start(name, "embedding", settings.device)
            if settings.reranker is not None:
                self.reranker = self._start(settings.reranker, "reranker", settings.device)
        except BaseException:
            self.close()
            raise
        self._opened = True

    def all(self) -> list[EncoderEngine]:
        """Those that are served."""
        return [engine for engine in (self.embedding, self.reranker) if engine is not None]

    def cancel(self, request_id: str) -> bool:
        """Abort a request of either. False if there is none."""
        return any(engine.cancel(request_id) for engine in self.all())

    def close(self, reason: VRAMancerError | None = None) -> None:
        """Give all memory back. Safe to call twice."""
        for engine in self.all():
            engine.close(reason)
        self.embedding = self.reranker = None

    def _start(self, source: str, kind: Kind, device: str) -> EncoderEngine:
        settings = self._settings.embeddings
        budget = self._budget(device)
        info, encoder = load_encoder(resolve_model(source), source, budget, max_batch_tokens=settings.max_batch_tokens)
        engine = EncoderEngine(
            info, encoder, budget, max_batch_tokens=settings.max_batch_tokens, max_queue=settings.max_queue,
            max_queued_tokens=settings.max_queued_tokens,
            threads=self._settings.devices.cpu_threads or torch.get_num_threads(),
        )  # fmt: skip
        if info.kind != kind:
            engine.close()
            key = "embeddings.model" if kind == "embedding" else "embeddings.reranker"
            raise ConfigError(f"{key}: {info.name} is {_ARTICLES[info.kind]}, not {_ARTICLES[kind]}.")
        engine.start()
        logger.info(
            "encoder loaded", kind=kind, model=info.name, device=info.device, dtype=info.dtype,
            dimensions=info.dimensions, max_tokens=info.max_model_len, pooling="+".join(info.layout.poolings),
            pooling_from="files" if info.layout.named else "assumed", reserved=format_bytes(budget.used_bytes),
        )  # fmt: skip
        return engine

    def _budget(self, named: str) -> DeviceBudget:
        """An encoder's ledger: a part of main memory's, or of a GPU with what is free on it now."""
        (device,) = open_devices(DeviceSettings(devices=named, memory_fraction=self._settings.devices.memory_fraction))
        if not device.computes_on_cpu:
            return DeviceBudget(device)
        return DeviceBudget(device, within=self._main_memory.budget)


_ARTICLES = {"embedding": "an embedding model", "reranker": "a reranker"}
