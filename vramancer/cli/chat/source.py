"""Where answers come from: a server that runs already, or a model loaded here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core.config import Settings
from core.config_schema import EmbeddingSettings
from core.defaults import DEMO_NAME, NO_MODEL
from core.errors import ConfigError, VRAMancerError
from vramancer.cli.chat.answerer import Answerer, LocalAnswerer, RemoteAnswerer, served_name
from vramancer.cli.client import ApiClient, local_url, read_token

Note = Callable[[str], None]

_PROBE_S = 0.5
"""A server on this machine that does not answer so soon is left alone."""
_LOOK_S = 5.0
"""For what it serves, once it is known to be one of ours."""


@contextmanager
def open_answerer(settings: Settings, url: str | None, *, local: bool, note: Note) -> Iterator[Answerer]:
    """The server at `url`; without one, a server on this machine that serves the model, unless `local`; without that,
    the model, loaded here until the end. `note` is told which. Raises `VRAMancerError`."""
    if url is not None and local:
        raise ConfigError("--url asks a server and --local loads the model here: give one of them.")
    if url is not None:
        yield RemoteAnswerer(ApiClient.for_settings(settings, url), settings.model.name)
        return
    found = None if local else running_server(settings, note)
    if found is not None:
        note(f"{found.model_name} on the server at {found.shared_at}; --local loads a model here instead")
        yield found
        return
    with _loaded_here(settings, note) as answerer:
        yield answerer


def running_server(settings: Settings, note: Note) -> RemoteAnswerer | None:
    """The server that the settings' host and port name, if it answers at once and serves the model asked for, or
    whatever it serves if none is. The token goes there alone, and only once it has answered as our servers do."""
    if settings.api.port == 0 or not _answers(ApiClient(local_url(settings), None)):
        return None
    asked = settings.model.name
    try:
        client = ApiClient(local_url(settings), read_token(settings))
        models = client.get("/v1/models", timeout_s=_LOOK_S)["data"]
        name = served_name(client, asked, timeout_s=_LOOK_S) if asked is not None and models else None
    except VRAMancerError as error:
        note(f"a server that runs here is not used: {error.message}")
        return None
    if not models:
        return None
    if asked is not None and name is None:
        note(f"the server at {client.url} serves {models[0]['id']}, not {asked}")
        return None
    return RemoteAnswerer(client, name or str(models[0]["id"]))


def _answers(client: ApiClient) -> bool:
    try:
        return bool(client.get("/live", timeout_s=_PROBE_S) == {"status": "alive"})
    except VRAMancerError:  # nobody there, or somebody else: as good as none
        return False


@contextmanager
def _loaded_here(settings: Settings, note: Note) -> Iterator[LocalAnswerer]:
    from core.inference_pipeline import InferencePipeline
    from vramancer.server import loading_bar

    note(f"loading {settings.model.name or DEMO_NAME} here")
    with loading_bar() as bar:
        alone = settings.model_copy(update={"embeddings": EmbeddingSettings(model=NO_MODEL)})
        pipeline = InferencePipeline(alone, on_progress=bar.report)
        try:
            pipeline.load()
            bar.finish()
            yield LocalAnswerer(pipeline)
        finally:
            pipeline.shutdown()
