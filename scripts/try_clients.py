#!/usr/bin/env python3
"""Do clients work? Starts servers, runs the checks of every client in an environment of its own, and prints a table.

    python scripts/try_clients.py --work .clients --write benchmarks/results/clients.md

Two servers on free ports of this machine: one with the demo model and the embedding model beside it, and one with a
model that says what a script has (`clients/scripted.py`), so that tool calls come also where a small model decides.
Packages come from PyPI and npm, in the versions that `scripts/clients/*` name; `--work` keeps them, and what came of
each client, for the next time. The exit status is 0 if no check failed for the server's or the client's sake.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from clients import scripted  # noqa: E402
from clients.environments import Client, Environment, all_clients  # noqa: E402
from clients.results import BROKEN, Line, Tried, read_lines, table  # noqa: E402

from core.models.resolve import DEMO_PATH  # noqa: E402
from tests.smoke import start  # noqa: E402
from vramancer import __version__  # noqa: E402

CHECKS_S = 1800.0
"""For all checks of a client."""
QUIET = ("--log-level", "warning")


@contextmanager
def serving(name: str, work: Path, *flags: str) -> Iterator[dict[str, str]]:
    """A server, and what `clients.common.served` says of it."""
    token, home = secrets.token_urlsafe(16), work / f"home-of-{name}"
    home.mkdir(parents=True, exist_ok=True)
    process, url = start(str(home), token, [*QUIET, *flags])
    try:
        names = [model["id"] for model in ask(url, token, "/v1/models")["data"]]
        yield {"url": url, "token": token, "model": names[0], "embedding": names[1] if len(names) > 1 else ""}
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def ask(url: str, token: str, path: str) -> Any:
    request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def demo_flags(work: Path) -> list[str]:
    """Lets a demo model whose template has no place for tools be made to call them: what its calls have to be is a
    grammar's doing."""
    template = (DEMO_PATH / "chat_template.jinja").read_text()
    if "tools" in template:
        return []
    changed = work / "demo-with-tools.jinja"
    changed.write_text(template + "{% if tools %}{% endif %}{# <tool_call> #}")
    return ["--chat-template", str(changed), "--tool-parser", "hermes"]


def try_client(client: Client, work: Path, servers: dict[str, dict[str, str]]) -> Tried:
    """Prepare its environment and run its checks."""
    tried = Tried(client.name, client.versions, datetime.now(timezone.utc).date().isoformat())
    environment, home = Environment(client, work), work / "home"
    home.mkdir(exist_ok=True)
    try:
        environment.prepare()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        tried.lines.append(Line("install", BROKEN, str(error)))
        return tried
    variables = environment.variables(home) | {
        f"CHECK_{name.upper()}": json.dumps(server) for name, server in servers.items()
    }  # fmt: skip
    process = subprocess.Popen(
        environment.command, cwd=environment.folder, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    status: int | None = None
    try:
        printed, said = process.communicate(timeout=CHECKS_S)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the session that was begun for it
        printed, said = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    tried.lines += read_lines(printed, status=status, said=said)
    return tried


def report(tried: list[Tried], command: str) -> str:
    """The page that is committed."""
    return f"""# Clients against a running server

VRAMancer {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}, on processors.
Made by

    {command}

which runs each client in an environment of its own, against two servers: `demo` is the demo model that comes with
VRAMancer, with its embedding model beside it; `scripted` is a model that says what a script has, which thinks, calls a
tool that it is offered, and answers once it has the result. Its chat template leaves out what is said, because the
instructions of coding agents and of smolagents are longer than the context of either model. `constrained` answers are
held to a schema or to a call of a tool, so that even a model without wit can only fail them by being cut off. Where the
demo model's template has no place for tools, it is given one that shows the model nothing of them. Each client's date
is that of its own run.

What a check came to: `ok`; `wit`, a well-formed answer that is not the one that was hoped for; `length`, an answer
that was cut off; `server`, anything else, such as an error, a malformed answer or a constrained one that does not
match; `broken`, the client or its checks ended before they were through.

{table(tried)}"""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, help="where environments are kept (default: a temporary directory)")
    parser.add_argument("--only", help="names of clients, with commas between them (default: all)")
    parser.add_argument("--write", type=Path, help="a file for the table, with earlier results of the others")
    chosen = parser.parse_args(argv)
    named = chosen.only.split(",") if chosen.only else [client.name for client in all_clients()]
    unknown = sorted(set(named) - {client.name for client in all_clients()})
    if unknown:
        parser.error(f"no such client: {', '.join(unknown)}; there are {', '.join(c.name for c in all_clients())}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    with ExitStack() as opened:
        work = (chosen.work or Path(opened.enter_context(tempfile.TemporaryDirectory()))).resolve()
        work.mkdir(parents=True, exist_ok=True)
        write = chosen.write.resolve() if chosen.write else None
        os.chdir(ROOT)  # whose packages the servers are to be of
        servers = {"demo": opened.enter_context(serving("demo", work, *demo_flags(work)))}
        scripted.build(work / "scripted")
        servers["scripted"] = opened.enter_context(
            serving("scripted", work, "--model", str(work / "scripted"), *scripted.FLAGS)
        )
        kept = work / "results"
        kept.mkdir(exist_ok=True)
        for name in named:
            tried = try_client(Client(name), work, servers)
            (kept / f"{name}.json").write_text(tried.to_json())
            print(table([tried]), flush=True)
        results = [Tried.from_json(path.read_text()) for path in sorted(kept.glob("*.json"))]
        now = [each for each in results if each.client in named]
        if write is not None:
            write.write_text(report(results, f"python scripts/try_clients.py --write {chosen.write}"))
    return 0 if all(each.good for each in now) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
