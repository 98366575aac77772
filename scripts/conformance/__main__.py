"""Hold the HTTP API against specifications that others wrote, and against its own.

    python scripts/conformance ours --minutes 60
    python scripts/conformance openai --spec openai.json --minutes 10
    python scripts/conformance llamacpp --tests llama.cpp/tools/server/tests

from the repository's root. Each starts the server with the bundled models. schemathesis, and what llama.cpp's tests
need (requests, openai), must be installed beside this Python; CONFORMANCE_PYTHON may name another one for the server.
`openai.json` is from https://github.com/openai/openai-openapi. The last results are in
benchmarks/results/conformance.md.
"""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import sys
import tempfile
from pathlib import Path

import llamacpp_tests
import openai_spec
from serving import EMBEDDING_MODEL, MODEL, Server, own_python, run, serving

FOLDER = Path(__file__).resolve().parent
SWAPS = ("/api/models/load", "/api/models/unload", "/api/pipeline/place", "/dashboard/session")
"""Routes that stop, swap or move the model, or open sessions: what follows would test another server."""
OURS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection", "missing_required_header", "unsupported_method", "use_after_free", "ignored_auth",
    "errors_are_typed",
)  # fmt: skip
"""Not that all data that a schema takes are accepted: which model is served, which token ids it has and how much fits
is no part of a schema."""
OPENAIS = (
    "not_a_server_error", "response_schema_conformance", "content_type_conformance", "events_conform",
    "refusals_are_typed",
)  # fmt: skip


def schemathesis(server: Server, where: str, checks: tuple[str, ...], hooks: str, minutes: float, *more: str,
                 **environment: str) -> int:  # fmt: skip
    return run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", where, "--header", f"Authorization: Bearer {server.token}",
            "--checks", ",".join(checks), "--max-time", str(round(minutes * 60)), "--request-timeout", "300",
            "--no-shrink", "--continue-on-failure", "--no-color", "--warnings", "off", *more,
        ],
        SCHEMATHESIS_HOOKS=hooks, PYTHONPATH=str(FOLDER), CONFORMANCE_MODEL=MODEL,
        CONFORMANCE_EMBEDDING_MODEL=EMBEDDING_MODEL, **environment,
    )  # fmt: skip


def ours(server: Server, folder: Path, options: argparse.Namespace) -> int:
    left_out = [part for path in SWAPS for part in ("--exclude-path", path)]
    return schemathesis(server, f"{server.url}/openapi.json", OURS, "our_hooks", options.minutes, *left_out)


def openai(server: Server, folder: Path, options: argparse.Namespace) -> int:
    """Afterwards it lists what was refused of what the specification takes."""
    spec, refusals = folder / "openai.json", folder / "refusals.jsonl"
    spec.write_text(json.dumps(openai_spec.read_spec(options.spec)), encoding="utf-8")
    refusals.touch()
    status = schemathesis(
        server, str(spec), OPENAIS, "openai_hooks", options.minutes, "--url", f"{server.url}/v1", "--mode",
        options.mode, CONFORMANCE_SPEC=str(spec), CONFORMANCE_REFUSALS=str(refusals),
    )  # fmt: skip
    found: collections.Counter[tuple[str, ...]] = collections.Counter()
    lines = refusals.read_text(encoding="utf-8").splitlines()
    for line in map(json.loads, lines):
        if line["positive"]:
            found[line["path"], str(line["status"]), str(line["code"]), str(line["param"]), line["message"][:160]] += 1
    for key, count in sorted(found.items()):
        print(count, *key, sep="\t")
    if options.keep is not None:
        shutil.copy(refusals, options.keep)
    return status


def llamacpp(server: Server, folder: Path, options: argparse.Namespace) -> int:
    """Afterwards it lists the tests that were left out, and why."""
    tests, reasons = folder / "tests", folder / "reasons.tsv"
    shutil.copytree(options.tests, tests)
    shutil.copy(FOLDER / "llamacpp_conftest.py", tests / "conftest.py")
    for names, own in ((llamacpp_tests.NAMES, MODEL), (llamacpp_tests.EMBEDDING_NAMES, EMBEDDING_MODEL)):
        for name in names:  # what the tests call the model
            server.ask("POST", "/api/models/load", {"model": name, "url": "self", "upstream_model": own})
    status = run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tests), str(tests / "unit")],
        CONFORMANCE_FOLDER=str(FOLDER), CONFORMANCE_PORT=str(server.port), CONFORMANCE_TOKEN=server.token,
        CONFORMANCE_REASONS=str(reasons), PYTHONPATH=str(tests),
    )  # fmt: skip
    if reasons.exists():
        print(reasons.read_text(encoding="utf-8"))
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python scripts/conformance", description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(required=True)
    for name, function, settings in (
        ("ours", ours, {}),
        ("openai", openai, {}),
        ("llamacpp", llamacpp, {"VRM_MODEL_MAX_MODEL_LEN": "256"}),  # as theirs
    ):
        kind = kinds.add_parser(name)
        kind.set_defaults(run=function, settings=settings)
        if name != "llamacpp":
            kind.add_argument("--minutes", type=float, default=10.0, help="how long")
    kinds.choices["openai"].add_argument("--spec", type=Path, required=True, help="OpenAI's specification, as JSON")
    kinds.choices["openai"].add_argument("--mode", choices=("positive", "negative", "all"), default="positive")
    kinds.choices["openai"].add_argument("--keep", type=Path, help="where to put the refusals, as JSON lines")
    kinds.choices["llamacpp"].add_argument("--tests", type=Path, required=True, help="tools/server/tests of llama.cpp")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(own_python(), folder, options.settings) as server:
            status: int = options.run(server, folder, options)
            faults = server.faults()
        for fault in faults:
            print("fault:", fault)
    return status or bool(faults)


if __name__ == "__main__":
    sys.exit(main())
