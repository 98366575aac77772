"""A load generator for streamed completions that costs little CPU: it notes when bytes arrive and parses afterwards."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class HttpError(RuntimeError):
    """The server answered with something other than a complete stream."""


@dataclass
class Arrival:
    """Everything one request received: pieces of the response, each with its time."""

    pieces: list[tuple[float, bytes]] = field(default_factory=list)


@dataclass
class StreamedCompletion:
    """One answer, parsed: when its text chunks came, and what the server says it generated."""

    chunk_times_s: list[float]
    completion_tokens: int
    text: str


def completion_body(model: str, prompt: list[int], max_tokens: int) -> bytes:
    """A streamed completion of exactly so many tokens."""
    return json.dumps(
        {
            "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip


def request_head(host: str, port: int, token: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
    """Of a POST to `/v1/completions`, over a connection that ends with the answer."""
    lines = [
        "POST /v1/completions HTTP/1.1", f"Host: {host}:{port}", f"Authorization: Bearer {token}",
        "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode()


async def _request(host: str, port: int, token: str, body: bytes, start_s: float, arrival: Arrival) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request_head(host, port, token, body) + body)
    await writer.drain()
    while piece := await reader.read(65536):
        arrival.pieces.append((time.perf_counter() - start_s, piece))
    writer.close()


def _split_head(arrival: Arrival) -> tuple[bytes, list[tuple[float, bytes]]]:
    data, pieces = b"", list(arrival.pieces)
    while pieces:
        when, piece = pieces.pop(0)
        data += piece
        head, separator, rest = data.partition(b"\r\n\r\n")
        if separator:
            return head, [(when, rest), *pieces]
    raise HttpError(f"no HTTP response, only {data[:200]!r}")


def _body_lines(pieces: list[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """Every line of the body with the time its end arrived; chunk sizes are lines of their own and harmless."""
    lines, pending = [], b""
    for when, piece in pieces:
        *complete, pending = (pending + piece).split(b"\n")
        lines += [(when, line.rstrip(b"\r")) for line in complete]
    return lines


def parse(arrival: Arrival) -> StreamedCompletion:
    """Check and read one streamed answer."""
    head, pieces = _split_head(arrival)
    status = int(head.split(b" ", 2)[1])
    if status != 200:
        raise HttpError(f"status {status}: {b''.join(piece for _, piece in pieces)[:500].decode(errors='replace')}")
    times_s: list[float] = []
    text, tokens, done = "", 0, False
    for when, line in _body_lines(pieces):
        if line == b"data: [DONE]":
            done = True
        elif line.startswith(b"data: "):
            event: dict[str, Any] = json.loads(line[6:])
            if "error" in event:
                raise HttpError(str(event["error"]))
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            for choice in event.get("choices", []):
                text += choice.get("text") or ""
                times_s.append(when)
    if not done:
        raise HttpError("the stream ended before [DONE]")
    return StreamedCompletion(times_s, tokens, text)


def run_streams(
    host: str, port: int, token: str, model: str, prompts: list[list[int]], max_tokens: int
) -> tuple[float, list[StreamedCompletion]]:
    """Send every prompt at once, each over its own connection; returns the wall time and the answers."""
    bodies = [completion_body(model, prompt, max_tokens) for prompt in prompts]
    arrivals = [Arrival() for _ in prompts]

    async def all_requests() -> float:
        start_s = time.perf_counter()
        jobs = (_request(host, port, token, body, start_s, a) for body, a in zip(bodies, arrivals, strict=True))
        await asyncio.gather(*jobs)
        return time.perf_counter() - start_s

    wall_s = asyncio.run(all_requests())
    return wall_s, [parse(arrival) for arrival in arrivals]
