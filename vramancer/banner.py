"""What a server says once it is ready: where it is, what it serves on what, how to ask it, how to stop it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from core.devices import format_bytes
from vramancer import __version__

if TYPE_CHECKING:
    from core.cluster.opening import OpenMaster
    from core.engine.model_engine import ModelEngine
    from core.inference_pipeline import InferencePipeline

WIDTH = 80
_LABEL = 13
"""Columns before a row's text."""


@dataclass(frozen=True, slots=True)
class Reached:
    """How a server is reached.

    Attributes:
        host, port: where the API listens.
        metrics_port: where the metrics listener does; 0: there is none.
        token_file: the file that keeps the token; None: it is in the settings.
        new_token: the token, if it was generated just now. It is shown, this once.
        cluster: where workers are taken in, if they are.
    """

    host: str
    port: int
    metrics_port: int
    token_file: Path | None = None
    new_token: str | None = None
    cluster: OpenMaster | None = None

    def shown(self) -> Reached:
        """The same once tokens that are new have been shown."""
        cluster = self.cluster
        if cluster is not None:
            cluster = replace(cluster, token=cluster.token._replace(created=False))
        return replace(self, new_token=None, cluster=cluster)

    def url(self, port: int) -> str:
        return f"http://[{self.host}]:{port}" if ":" in self.host else f"http://{self.host}:{port}"


def banner(pipeline: InferencePipeline, reached: Reached) -> str:
    """The text. Lines fit into 80 columns, but for names and paths that do not."""
    engine, model = pipeline.engine, pipeline.model
    rows = [
        ("API", f"{reached.url(reached.port)}/v1"),
        *([("dashboard", f"{reached.url(reached.port)}/dashboard")] if pipeline.settings.dashboard.enabled else []),
        ("model", f"{', '.join((model.name, *model.aliases))} ({model.dtype}, up to {model.max_model_len} tokens)"),
        *_device_rows(engine),
        ("token", _token(reached)),
        ("metrics", _metrics(reached, pipeline.settings.api.metrics_port)),
        *([("cluster", cluster_text(reached.cluster))] if reached.cluster is not None else []),
        ("stop", "Ctrl-C; requests under way may finish, a second Ctrl-C ends them"),
    ]
    more = [*_example(reached), *(cluster_lines(reached.cluster) if reached.cluster else [])]
    return "\n".join([f"VRAMancer {__version__} is ready", *_laid_out(rows), *more])


def waiting(reason: str, reached: Reached) -> str:
    """What is said instead while the model waits for machines: `reason`. The rest follows once it is loaded."""
    assert reached.cluster is not None
    rows = [
        ("API", f"{reached.url(reached.port)}/v1, which answers 503 until the model is there"),
        ("token", _token(reached)),
        ("cluster", cluster_text(reached.cluster)),
        ("stop", "Ctrl-C"),
    ]
    return "\n".join([f"waiting for machines: {reason}", *_laid_out(rows), *cluster_lines(reached.cluster)])


def stub_banner(reason: str, reached: Reached) -> str:
    """What is said instead where a stub answers, since the model could not be loaded for this `reason`."""
    rows = [
        ("API", f"{reached.url(reached.port)}/v1, where a stub answers, which is no language model"),
        ("model", "none; POST /api/models/load loads one"),
        ("token", _token(reached)),
        ("stop", "Ctrl-C"),
    ]
    return "\n".join([f"no model could be loaded: {reason}", *_laid_out(rows)])


def without_model(pipeline: InferencePipeline, reached: Reached) -> str:
    """What is said instead where no model is to be served by this machine."""
    groups = pipeline.upstreams.groups()
    rows = [
        ("API", f"{reached.url(reached.port)}/v1"),
        ("model", "none here; POST /api/models/load loads one"),
        *(("upstream", f"{group.name}, by {len(group.replicas)} other server(s)") for group in groups),
        *((encoder.info.kind, encoder.info.name) for encoder in pipeline.encoders.all()),
        ("token", _token(reached)),
        ("metrics", _metrics(reached, pipeline.settings.api.metrics_port)),
        ("stop", "Ctrl-C; requests under way may finish, a second Ctrl-C ends them"),
    ]
    return "\n".join([f"VRAMancer {__version__} is ready", *_laid_out(rows)])


def _laid_out(rows: list[tuple[str, str]]) -> list[str]:
    lines: list[str] = []
    for label, text in rows:
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"  {label:{_LABEL - 3}} ", subsequent_indent=" " * _LABEL,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return lines


def cluster_lines(cluster: OpenMaster) -> list[str]:
    """What to type on another machine. The token is shown once, when it has just been made."""
    host, port = cluster.master.address
    token = cluster.token
    if token.created:
        value, more = token.value, f" (the token is new, shown only now, and kept in {token.path})"
    elif token.path is not None:
        value, more = "...", f" (the token is in {token.path})"
    else:
        value, more = "...", " (the token is the one in VRM_CLUSTER_TOKEN or cluster.token)"
    encrypted = "VRM_CLUSTER_TLS=1 " if cluster.master.tls else ""
    found = "" if cluster.master.is_found else f"VRM_CLUSTER_MASTER={host}:{port} "
    return [
        f"  {'add one':{_LABEL - 3}} on another machine{more}:",
        f"    VRM_CLUSTER_TOKEN={value} {encrypted}{found}python -m vramancer.main --cluster-worker",
    ]


def cluster_text(cluster: OpenMaster) -> str:
    """Where workers are taken in, and how many there are."""
    host, port = cluster.master.address
    found = "found by mDNS and broadcast" if cluster.master.is_found else "not found by themselves"
    joined = len(cluster.master.nodes)
    return f"workers are accepted at {host}:{port}, {found}; {joined} {'has' if joined == 1 else 'have'} joined"


def _device_rows(engine: ModelEngine) -> list[tuple[str, str]]:
    """The split: a line for each stage, and one for each device that holds none."""
    placement, pooled = engine.plan.placement, engine.plan.pooled
    rows = []
    for stage, tokens in zip(placement.stages, pooled.local_tokens, strict=True):
        held = f"layers {stage.first_layer}-{stage.last_layer - 1}, {format_bytes(stage.weight_bytes)} of weights"
        streams = f", {len(stage.streamed_layers)} layers streamed in" if stage.streamed_layers else ""
        rows.append((stage.device_name, f"{held}, {tokens} tokens of KV{streams}"))
    if pooled.tokens > min(pooled.local_tokens):
        rows.append(("KV", f"{pooled.tokens} tokens in all, with memory that devices lend each other"))
    return [*rows, *((name, "holds no layers") for name in placement.unused_devices)]


def _token(reached: Reached) -> str:
    if reached.token_file is None:
        return "the one in VRM_API_TOKEN or api.token"
    kept = f"kept in {reached.token_file}"
    return kept if reached.new_token is None else f"{reached.new_token} (new, shown only now; {kept})"


def _metrics(reached: Reached, usual: int) -> str:
    if reached.metrics_port == 0:
        return "off"
    taken = f" ({usual} was taken)" if usual not in (0, reached.metrics_port) else ""
    return f"{reached.url(reached.metrics_port)}/metrics{taken}"


def _example(reached: Reached) -> list[str]:
    """A request for the shell."""
    value = "$VRM_API_TOKEN" if reached.token_file is None else f"$(cat '{reached.token_file}')"
    return [
        f"  {'try it':{_LABEL - 3}} curl {reached.url(reached.port)}/v1/completions \\",
        f'    -H "Authorization: Bearer {value}" \\',
        "    -H 'Content-Type: application/json' \\",
        '    -d \'{"prompt": "Once upon a time", "max_tokens": 32}\'',
    ]
