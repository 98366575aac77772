"""Whether answers keep to JSON schemas: 500 of them, five tokenizers, random models at temperature 1, the real server.

    pip install jsonschema
    python -m benchmarks.schemas                       # the suite of `benchmarks.schema_suite`
    python -m benchmarks.schemas --folder DIR --most 500 --vocabularies Unigram    # schemas from files, such as a
                                                                                  # checkout of JSONSchemaBench

Each schema is the `response_format` of a completion. An answer that ends by `stop` is read and validated; any other
must have been cut by its length, be as long as that, and be the beginning of JSON. A schema may be refused, with a 400
about `response_format`, by every tokenizer alike. All else is a failure, and the exit status 1. Tokens that close
something are made likelier (`logit_bias`), so that random answers come to an end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pydantic_core
from flask import Flask

from benchmarks.models import Shape, build_checkpoint, default_workdir
from benchmarks.schema_suite import Sample, suite, validator_of
from benchmarks.vocabularies import BUILT, NAMES, tokenizer_of, wrapped
from core.api import create_app
from core.config import load_settings
from core.inference_pipeline import InferencePipeline

TOKEN = "a-token-of-the-benchmark"
STREAMS = 16
CLOSING = (b'"', b"}", b"]", b",", b":")
BIAS = 5.0
FORMATS = jsonschema.FormatChecker(["uuid", "ipv4", "ipv6", "email"])
"""Those of which all that is let through is right: the 29th of February is in every year."""
OUTCOMES = ("ended", "cut", "refused", "failed")


@dataclass(slots=True)
class Table:
    """How many schemas of a family ended how, by outcome; what failed, and why some were refused."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    refused: set[int] = field(default_factory=set)

    def add(self, family: str, outcome: str) -> None:
        self.counts.setdefault(family, Counter())[outcome] += 1

    def totals(self) -> Counter[str]:
        return sum(self.counts.values(), Counter())


def judged(schema: Any, choice: dict[str, Any], tokens: int, most: int) -> str:
    """`ended` or `cut`. Raises `ValueError` for an answer that is neither."""
    text, reason = choice["text"], choice["finish_reason"]
    if reason == "stop":
        value = json.loads(text)
        try:
            validator_of(schema, FORMATS).validate(value)
        except jsonschema.ValidationError as error:
            raise ValueError(f"{error.message[:200]} at {error.json_path}") from None
        return "ended"
    if reason != "length" or tokens != most:
        raise ValueError(f"it ended by {reason} after {tokens} of {most} tokens")
    if text.strip():
        pydantic_core.from_json(text.rstrip("\ufffd"), allow_partial="trailing-strings")
    return "cut"


@contextmanager
def served(name: str, workdir: Path) -> Iterator[tuple[Flask, dict[str, float]]]:
    """A server with a random model of this vocabulary, and the bias that closes."""
    tokenizer = tokenizer_of(name)
    given: dict[str, Any] = {
        "devices.devices": "cpu=512MiB", "engine.max_batch_size": STREAMS, "engine.max_queue": 4 * STREAMS,
        "model.max_model_len": 1024, "security.disable_rate_limit": True, "embeddings.model": "none",
    }  # fmt: skip
    if name in BUILT:
        shape = Shape(
            hidden=64, intermediate=64, layers=1, heads=2, kv_heads=1, vocab=tokenizer.vocab_size, context=1024
        )
        folder = workdir / "models" / f"schemas-{''.join(filter(str.isalnum, name))}"
        given["model.name"] = str(build_checkpoint(folder, shape, tokenizer=wrapped(name)))
    pipeline = InferencePipeline(load_settings(config_file=None, environ={"VRM_API_TOKEN": TOKEN}, overrides=given))
    words = tokenizer.grammars([tokenizer.eos_token_id or 0]).vocabulary.tokens
    closing = [token for token, word in enumerate(words) if word.lstrip()[:1] in CLOSING][:1000]
    try:
        pipeline.load()
        yield create_app(pipeline), {str(token): BIAS for token in closing}
    finally:
        pipeline.shutdown()


def ask(app: Flask, schema: Any, bias: dict[str, float], most: int, seed: int) -> tuple[int, Any]:
    """Status and answer. A server that is busy with compiling others' grammars is asked again."""
    body = {
        "prompt": "A", "max_tokens": most, "temperature": 1.0, "seed": seed, "logit_bias": bias,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}},
    }  # fmt: skip
    while True:
        response = app.test_client().post("/v1/completions", json=body, headers={"X-API-TOKEN": TOKEN})
        if response.status_code != 503:
            return response.status_code, response.get_json()
        time.sleep(float(response.headers.get("Retry-After", 1)))


def run(samples: Sequence[Sample], name: str, workdir: Path, most: int) -> Table:
    """All samples over one vocabulary."""
    table = Table()
    with served(name, workdir) as (app, bias), ThreadPoolExecutor(STREAMS) as threads:
        asked = [
            threads.submit(ask, app, sample.schema, bias, most, number) for number, sample in enumerate(samples)
        ]  # fmt: skip
        for number, (sample, future) in enumerate(zip(samples, asked, strict=True)):
            status, answer = future.result()
            try:
                outcome = _outcome(sample, status, answer, most)
            except ValueError as error:
                outcome = "failed"
                table.failures.append(f"{name}, {sample.family} {number}: {error}")
            table.add(sample.family, outcome)
            if outcome == "refused":
                table.refused.add(number)
                table.reasons[answer["error"]["message"].partition(": ")[2][:90]] += 1
    return table


def _outcome(sample: Sample, status: int, answer: Any, most: int) -> str:
    if status == 400:
        if not str(answer["error"]["param"]).startswith("response_format"):
            raise ValueError(f"refused for {answer['error']}")
        return "refused"
    if status != 200:
        raise ValueError(f"status {status}: {answer['error']['message'][:200]}")
    return judged(sample.schema, answer["choices"][0], answer["usage"]["completion_tokens"], most)


def from_folder(folder: Path, most: int) -> list[Sample]:
    """As many of a folder's schemas, evenly; the family is the folder that each is in."""
    found = []
    paths = sorted(folder.rglob("*.json"))
    for path in paths[:: max(1, len(paths) // most)][:most]:
        try:
            schema = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(schema, dict):
            found.append(Sample(path.parent.name, schema))
    return found


def report(tables: dict[str, Table]) -> str:
    """A table in Markdown: families down, outcomes of all vocabularies together across; then vocabularies."""
    lines = ["| schemas | " + " | ".join(OUTCOMES) + " |", "|---|" + "---|" * len(OUTCOMES)]
    families: dict[str, Counter[str]] = {}
    for table in tables.values():
        for family, counts in table.counts.items():
            families.setdefault(family, Counter()).update(counts)
    rows = [*families.items(), *((f"**{name}**", table.totals()) for name, table in tables.items())]
    lines += [f"| {name} | " + " | ".join(str(counts[each]) for each in OUTCOMES) + " |" for name, counts in rows]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="take schemas from the JSON files in it")
    parser.add_argument("--most", type=int, default=500, help="as many schemas")
    parser.add_argument("--vocabularies", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--workdir", type=Path, default=default_workdir())
    options = parser.parse_args(argv)
    samples = from_folder(options.folder, options.most) if options.folder else suite()[: options.most]
    tables: dict[str, Table] = {}
    for name in options.vocabularies:
        began_s = time.perf_counter()
        tables[name] = run(samples, name, options.workdir, options.max_tokens)
        print(f"{name}: {dict(tables[name].totals())}, {time.perf_counter() - began_s:.0f} s", file=sys.stderr)
    print(report(tables))
    reasons: Counter[str] = sum((table.reasons for table in tables.values()), Counter())
    print("\nRefused:", *(f"{count} times: {reason}" for reason, count in reasons.most_common()), sep="\n- ")
    failures = [failure for table in tables.values() for failure in table.failures]
    if len({frozenset(table.refused) for table in tables.values()}) > 1:
        failures.append("not all vocabularies have refused the same schemas")
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
