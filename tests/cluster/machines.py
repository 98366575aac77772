"""A master and workers, each a cluster node of its own: in this process, or a process each."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from steering import until

from core.cluster.master import Master
from core.cluster.worker import Worker
from core.config import ClusterSettings, Settings
from core.devices import open_devices
from core.network.handshake import derive_key

HOST, VERSION = "127.0.0.1", "1.2.3"
TOKEN = "a cluster's token, of tests"
SILENCE_S = 20.0
"""Tests share a machine: what is silent for a moment is not gone."""


def cluster_settings(**given: Any) -> ClusterSettings:
    return ClusterSettings.model_validate({"port": 0, "worker_port": 0, "silence_s": SILENCE_S, **given})


def open_master(**given: Any) -> Master:
    master = Master(cluster_settings(**given), derive_key(TOKEN), version=VERSION, host=HOST, name="master")
    master.start()
    return master


def worker_settings(cache: Path, devices: str, keeps: int | None = None, lends: int = 0) -> Settings:
    """A worker that keeps its parts of blocks in `keeps` bytes of main memory, and whole ones in `lends`."""
    given = {
        "devices": {"devices": devices, "profile_seconds": 0.02}, "runtime": {"cache_dir": cache},
        "memory": {"host_bytes": keeps}, "cluster": {"memory_bytes": lends},
    }  # fmt: skip
    return Settings.model_validate(given)


def joining(master: str, settings: Settings) -> Settings:
    """Of a worker that joins a master."""
    cluster = cluster_settings(master=master, memory_bytes=settings.cluster.memory_bytes)
    return settings.model_copy(update={"cluster": cluster})


def open_worker(
    master: Master, settings: Settings, name: str, /, version: str = VERSION, token: str = TOKEN, **given: Any
) -> Worker:
    """Joins the master, and encrypts if that one does, unless the cluster's settings are `given` otherwise."""
    host, port = master.address
    found = cluster_settings(
        **{
            "master": f"{host}:{port}", "tls": master.tls, "memory_bytes": settings.cluster.memory_bytes, **given,
        }
    )  # fmt: skip
    settings = settings.model_copy(update={"cluster": found})
    return Worker(settings, open_devices(settings.devices), derive_key(token), version=version, name=name)


class WorkerThread:
    """A worker in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"vrm-worker-{worker.name}")
        self._thread.start()

    def _run(self) -> None:
        try:
            self.worker.run()
        except Exception as error:  # noqa: BLE001  looked at by the test
            self.error = error

    def join(self) -> None:
        self._thread.join()

    def close(self) -> None:
        self.worker.stop()
        self._thread.join()
        self.worker.close()


class WorkerProcess:
    """A worker in a process of its own."""

    def __init__(
        self, master: Master, cache: Path, name: str, devices: str, keeps: int | None = None, lends: int = 0
    ) -> None:
        host, port = master.address
        given = {
            "master": f"{host}:{port}", "cache": str(cache), "name": name, "devices": devices, "keeps": keeps,
            "lends": lends,
        }  # fmt: skip
        paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
        program = f"import sys; sys.path[:0] = {paths!r}; from cluster.machines import main; main()"
        self.process = subprocess.Popen([sys.executable, "-c", program, json.dumps(given)], stdin=subprocess.PIPE)

    def close(self) -> None:
        """Lets it end by itself, if it has not been killed."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """A worker that ends with its standard input."""
    given = json.loads(sys.argv[1])
    settings = worker_settings(Path(given["cache"]), given["devices"], given["keeps"], given["lends"])
    settings = joining(given["master"], settings)
    worker = Worker(settings, open_devices(settings.devices), derive_key(TOKEN), version=VERSION, name=given["name"])
    threading.Thread(target=lambda: (sys.stdin.read(), worker.stop()), daemon=True).start()
    worker.run()
    worker.close()


def joined(master: Master, count: int) -> None:
    """Wait until so many workers are there."""
    until(lambda: len(master.nodes) == count, f"{count} workers")
