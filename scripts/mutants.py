"""Would the tests notice? Puts one small fault after another into the code and runs the tests that pass through it.

    python scripts/mutants.py map                               # once, after changes: which test runs which line
    python scripts/mutants.py run core/batching core/tiers --sample 60 --seed 1 --jobs 2 --report mutants.md

Needs `pip install cosmic-ray` (its operators make the faults). Each job works in a copy of the repository of its own.
Faults in annotations and decorators are left out, and of several faults at one place only one is tried. Survivors are
for reading: each is a test that is missing, or a change that changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / ".mutants"
ENVIRONMENT = {"VRM_MINIMAL_TEST": "1", "VRM_DISABLE_RATE_LIMIT": "1", "VRM_TEST_MODE": "1"}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
_NOT_STARTED = 4
"""Exit status of a pytest that does not get to run tests."""
QUIETLY = ("-q", "-p", "no:cacheprovider", "--no-cov")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", re.MULTILINE)
_FAILING = re.compile(r"^[.sx]*[FE]+ *(?:\[.*)?$", re.MULTILINE)  # pytest's line of progress
PLACE = ("lineno", "col_offset", "end_lineno", "end_col_offset")
SKIPPED_OPERATORS = ("core/NoOp", "core/RemoveDecorator")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is tried for one fault, at most."""

    tests: int
    seconds: float


AT_FIRST, AGAIN = Bounds(60, 40.0), Bounds(600, 120.0)


@dataclass(frozen=True, slots=True)
class Fault:
    """One change of one file."""

    file: str
    line: int
    operator: str
    occurrence: int


Result = tuple[Fault, str, str, list[str]]
"""A fault, what came of it, the change in words, and the tests that failed."""


def environment() -> dict[str, str]:
    """For the tests: nothing of the machine's own settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("VRM_")} | ENVIRONMENT


def make_map(tests: list[str], jobs: int) -> int:
    """Run the suite once under coverage, each line with the tests that ran it; given `tests` join the map there is."""
    DATA.mkdir(exist_ok=True)
    (DATA / ".gitignore").write_text("*\n")
    covered = ["--cov=core", "--cov=vramancer", "--cov-context=test", "--cov-report="]
    times = DATA / f"times-{len(list(DATA.glob('times*.xml')))}.xml" if tests else DATA / "times.xml"
    covered += ["--cov-append"] if tests else []
    for file in [] if tests else list(DATA.glob("times*.xml")):
        file.unlink()
    settings = environment() | {"COVERAGE_FILE": str(DATA / "coverage")}
    parallel = ["-n", str(jobs), "--dist", "loadfile"] if jobs > 1 else []
    command = [*PYTEST, *covered, *parallel, f"--junitxml={times}", *(tests or ["tests"])]
    return subprocess.run(command, cwd=ROOT, env=settings, check=False).returncode


def durations() -> dict[str, float]:
    """Seconds of each test of the map, by node id."""
    times: dict[str, float] = {}
    for file in sorted(DATA.glob("times*.xml")):
        for case in ET.parse(file).iter("testcase"):
            times[f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"] = float(case.get("time", 0))
    return times


def tests_by_line(file: str) -> dict[int, set[str]]:
    """Node ids of the tests that ran each line of a file."""
    from coverage import CoverageData

    data = CoverageData(str(DATA / "coverage"))
    data.read()
    found = data.contexts_by_lineno(str(ROOT / file))
    return {line: {name.rpartition("|")[0] for name in names if name} for line, names in found.items()}


def choose_tests(file: str, line: int, times: dict[str, float], bounds: Bounds, without: Collection[str]) -> list[str]:
    """Tests that ran the line: first those of the file's own room, then short ones, within bounds. For a line that runs
    when the module is imported, those that ran anything in the file, or else those of the room."""
    by_line = tests_by_line(file)
    room = file.split("/")[1]
    room = room.partition("_")[0].removesuffix(".py") if room.endswith(".py") else room
    names = by_line.get(line) or {name for names in by_line.values() for name in names}
    names = (names or {name for name in times if f"/{room}/" in name}) - set(without)
    ordered = sorted(names, key=lambda name: (f"/{room}/" not in name, times.get(name, 1.0), name))
    chosen: list[str] = []
    total_s = 0.0
    for name in ordered:
        total_s += times.get(name, 1.0)
        if len(chosen) >= bounds.tests or (chosen and total_s > bounds.seconds):
            break
        chosen.append(name)
    return chosen


def ignored_spans(source: str) -> list[tuple[int, ...]]:
    """Lines of annotations and decorators: what stands there does nothing while the program runs, or is not ours."""
    spans: list[tuple[int, ...]] = []
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.AST | None] = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        parts += getattr(node, "decorator_list", [])
        spans += [tuple(getattr(part, name) for name in PLACE) for part in parts if part is not None]
    return spans


def all_faults(package: str, tree: Path) -> dict[tuple[str, int, int, str], list[Fault]]:
    """Every fault that the operators can make in a package, by place and kind of operator."""
    from cosmic_ray.commands.init import init
    from cosmic_ray.work_db import WorkDB, use_db

    paths = [tree / part for part in package.split(",")]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    places: dict[tuple[str, int, int, str], list[Fault]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/work.sqlite", WorkDB.Mode.create) as work:
        init(files, work, {})
        for item in work.work_items:
            (mutation,) = item.mutations
            file = str(Path(mutation.module_path).relative_to(tree))
            line, column = mutation.start_pos
            if mutation.operator_name in SKIPPED_OPERATORS or _ignored(tree / file, line, column):
                continue
            kind = mutation.operator_name.partition("_")[0]
            places[file, line, column, kind].append(Fault(file, line, mutation.operator_name, mutation.occurrence))
    return places


def _ignored(file: Path, line: int, column: int, spans: dict[Path, Any] = {}) -> bool:  # noqa: B006  a cache
    if file not in spans:
        spans[file] = ignored_spans(file.read_text())
    return any((a, b) <= (line, column) <= (c, d) for a, b, c, d in spans[file])


def sample(package: str, count: int, seed: int, tree: Path) -> list[Fault]:
    """So many places of a package, and one fault at each that is still Python."""
    places = all_faults(package, tree)
    rng = random.Random(f"{package} {seed}")
    chosen: list[Fault] = []
    for place in rng.sample(sorted(places), len(places)):
        fault = rng.choice(places[place])
        if len(chosen) < count and is_python(fault, tree):
            chosen.append(fault)
    return chosen


def is_python(fault: Fault, tree: Path) -> bool:
    """Whether the file with the fault compiles: what does not is noticed by anything."""
    try:
        compile(mutated(fault, tree)[0], "mutant", "exec")
    except (SyntaxError, AttributeError):  # the second: an exception by its module's name, which is no name to replace
        return False
    return True


def mutated(fault: Fault, tree: Path) -> tuple[str, str]:
    """The file's text with the fault in it, and the lines that differ."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    before = (tree / fault.file).read_text()
    after = mutate_code(before, get_operator(fault.operator)(), fault.occurrence)
    assert after is not None, fault
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return after, "; ".join(line for line in lines if re.match(r"[-+][^-+]", line))


class Runner:
    """A process that has imported what is slow to import, none of it ours, and forks a pytest for each fault."""

    _PROGRAM = """
import json, os, sys
import flask, pytest, torch, transformers, transformers.models.llama.modeling_llama
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        sys.path.insert(0, os.getcwd())
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        written = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for output in (1, 2):
            os.dup2(written, output)
        status = 70
        try:
            status = pytest.main(order)
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        # Programs that the tests start find the copy too, wherever they run.
        settings = environment() | {"PYTHONPATH": str(tree)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM], cwd=tree, env=settings, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, tests: list[str], limit_s: float, *options: str) -> tuple[int, list[str]]:
        """Exit status of a pytest of these tests, below 0 if a signal ended it, such as ours after `limit_s`; and the
        tests that failed. RuntimeError: pytest itself did not work."""
        # What is imported already cannot be rewritten any more; warnings are errors.
        arguments = [*QUIETLY, "-W", "ignore::pytest.PytestAssertRewriteWarning", *options, *tests]
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()
        group = int(process.stdout.readline())
        timer = threading.Timer(limit_s, _kill, (group,))
        timer.start()
        status = int(process.stdout.readline())
        timer.cancel()
        _kill(group)  # what tests left behind
        said = (self.tree / "said").read_text(errors="replace")
        failed = _FAILED.findall(said)
        if status == _NOT_STARTED and "ERROR: not found" in said and any("[" in name for name in tests):
            # Names of parameters may come out otherwise than they went in.
            return self.run(list(dict.fromkeys(name.partition("[")[0] for name in tests)), limit_s, *options)
        if (status == _NOT_STARTED and "while loading conftest" in said) or _FAILING.search(said):
            return status, failed  # nothing works with this fault, or pytest cannot even report on it
        if status > 0 and not failed:
            raise RuntimeError(f"pytest ended with {status}: {said[-2000:]}")
        return status, failed

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def try_fault(
    fault: Fault, runner: Runner, times: dict[str, float], bounds: Bounds, without: Collection[str]
) -> tuple[str, str, list[str]]:
    """`killed`, `survived` or `not run by any test`, the change in words, and the tests that failed."""
    text, change = mutated(fault, runner.tree)
    tests = choose_tests(fault.file, fault.line, times, bounds, without)
    if not tests:
        return "not run by any test", change, []
    target = runner.tree / fault.file
    before = target.read_text()
    target.write_text(text)
    limit_s = 20 + 3 * sum(times.get(name, 1.0) for name in tests)
    try:
        status, failed = runner.run(tests, limit_s, "-x")
    finally:
        target.write_text(before)
    return ("survived" if status == 0 else "killed"), change, failed


def failing_anyway(tests: Collection[str], runners: list[Runner]) -> set[str]:
    """Which of these tests fail without a fault."""
    ordered = sorted(tests)
    with ThreadPoolExecutor(len(runners)) as pool:
        shares = [ordered[number :: len(runners)] for number in range(len(runners))]
        found = pool.map(lambda runner, share: runner.run(share, 3600.0)[1] if share else [], runners, shares)
        return {name for names in found for name in names}


def worktrees(folder: Path, count: int) -> Iterator[Path]:
    """Copies of the working tree as it is committed."""
    for number in range(count):
        tree = folder / f"job-{number}"
        subprocess.run(["git", "worktree", "add", "--detach", "-q", str(tree)], cwd=ROOT, check=True)
        yield tree


def unnoticed(report: Path) -> set[str]:
    """The faults that a report calls not noticed, as `run` writes them."""
    return {line for line in report.read_text().splitlines() if line.startswith("- ")}


def _line(fault: Fault, change: str) -> str:
    return f"- `{fault.file}:{fault.line}`: `{change}`"


def run(packages: list[str], count: int, seed: int, jobs: int, report: Path | None, again: Path | None) -> int:
    """Try a sample of faults of each package; prints survivors and the share that was killed. `again`: of the same
    sample, only what that report calls not noticed."""
    times = durations()
    rows, survivors = [], []
    with tempfile.TemporaryDirectory() as folder:
        made = list(worktrees(Path(folder), jobs))
        runners = [Runner(tree) for tree in made]
        idle: SimpleQueue[Runner] = SimpleQueue()
        for runner in runners:
            idle.put(runner)

        def attempt(fault: Fault, without: Collection[str] = ()) -> Result:
            runner = idle.get()
            try:
                return fault, *try_fault(fault, runner, times, AT_FIRST if again is None else AGAIN, without)
            finally:
                idle.put(runner)

        def attempts(faults: list[Fault]) -> list[Result]:
            """What comes of each; tests that fail without a fault too are no witnesses."""
            with ThreadPoolExecutor(jobs) as pool:
                results = list(pool.map(attempt, faults))
                suspect = failing_anyway({name for result in results for name in result[3]}, runners)
                for name in sorted(suspect):
                    print(f"  fails without a fault too: {name}", flush=True)
                doubtful = {result[0] for result in results if suspect.intersection(result[3])}
                again = dict(zip(doubtful, pool.map(lambda fault: attempt(fault, suspect), doubtful), strict=True))
            return [again.get(result[0], result) for result in results]

        try:
            known = None if again is None else unnoticed(again)
            for package in packages:
                faults = sample(package, count, seed, made[0])
                tried = [each for each in faults if known is None or _line(each, mutated(each, made[0])[1]) in known]
                results = attempts(tried)
                alive = [result for result in results if result[1] != "killed"]
                rows.append((package, len(faults), len(faults) - len(alive)))
                survivors += alive
                print(f"{package}: {len(faults) - len(alive)} of {len(faults)} killed", flush=True)
                for fault, outcome, change, _ in alive:
                    print(f"  {outcome}: {fault.file}:{fault.line} {change}", flush=True)
        finally:
            for runner in runners:
                runner.close()
            for tree in made:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=False)
    if report is not None:
        lines = ["| package | faults | noticed |", "|---|---|---|"]
        lines += [f"| `{name}` | {total} | {killed} ({killed / max(1, total):.0%}) |" for name, total, killed in rows]
        lines += ["", "Not noticed:", ""]
        lines += [_line(fault, change) for fault, _, change, _ in survivors]
        report.write_text("\n".join(lines) + "\n")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    mapping = commands.add_parser("map", help="which test runs which line")
    mapping.add_argument("tests", nargs="*", help="only these tests")
    running = commands.add_parser("run", help="try faults")
    running.add_argument("packages", nargs="+", help="folders or files, such as core/batching; a,b together")
    running.add_argument("--sample", type=int, default=60, help="faults per package")
    running.add_argument("--seed", type=int, default=1)
    running.add_argument("--again", type=Path, help="a report of the same sample: only what it calls not noticed")
    running.add_argument("--report", type=Path, help="write a table to this file")
    for command in (mapping, running):
        command.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.command == "map":
        return make_map(arguments.tests, arguments.jobs)
    return run(arguments.packages, arguments.sample, arguments.seed, arguments.jobs, arguments.report, arguments.again)


if __name__ == "__main__":
    sys.exit(main())
