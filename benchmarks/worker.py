"""One engine in its own process: commands come in on stdin, answers go out on stdout, one JSON object a line.

Between commands the process is blocked on the pipe, so engines can take turns without disturbing one another.
What the engine itself prints goes to stderr, which the parent keeps in a log file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

from benchmarks.peers.base import PeerUnavailable, RunResult, Score, ScoringPeer

HERE = Path(__file__).resolve().parent.parent
_OF_CHECKOUT = """
import sys
sys.path[0] = sys.argv.pop(1)
from benchmarks import worker
sys.path[0] = sys.argv.pop(1)
worker.main()
"""
"""These benchmarks, whatever checkout the engine is from."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def stop_on_sigterm() -> None:
    """Let SIGTERM end the program as an exception does, so that its workers are closed."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


class WorkerError(RuntimeError):
    """The engine failed; the message ends with the end of its log."""


class Worker:
    """The parent's handle on a worker process."""

    def __init__(self, peer: str, threads: int, log_dir: Path, checkout: Path | None = None) -> None:
        """Start the process, with the engine of another `checkout` if given; nothing is loaded yet."""
        self.peer = peer
        log_dir.mkdir(parents=True, exist_ok=True)
        log_path = self._log_path = log_dir / f"{peer}-{os.getpid()}{'-other' if checkout else ''}.log"
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads)) | {"TOKENIZERS_PARALLELISM": "false"}
        with log_path.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _OF_CHECKOUT, str(HERE), str(checkout or HERE), "--peer", peer],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip

    def _call(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.peer} ended unexpectedly:\n{self._log_tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "unavailable" in answer:
            raise PeerUnavailable(answer["unavailable"])
        if "error" in answer:
            raise WorkerError(f"{self.peer}: {answer['error']}\n{self._log_tail()}")
        return answer

    def _log_tail(self, lines: int = 15) -> str:
        return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-lines:])

    def load(
        self, model_dir: Path, threads: int, max_streams: int, max_context: int, **settings: Any
    ) -> dict[str, Any]:
        """Load the model; returns what the peer says about itself. `settings` are for peers that take them."""
        answer = self._call(
            do="load", model_dir=str(model_dir), threads=threads, max_streams=max_streams, max_context=max_context,
            **settings,
        )  # fmt: skip
        info: dict[str, Any] = answer["info"]
        return info

    def run(self, prompts: list[list[int]], max_tokens: int) -> tuple[RunResult, float]:
        """Run the prompts; returns the result and the CPU seconds the process spent on it."""
        answer = self._call(do="run", prompts=prompts, max_tokens=max_tokens)
        return RunResult.from_json(answer["result"]), answer["cpu_s"]

    def score(self, texts: list[list[int]], counted: list[list[bool]]) -> Score:
        """How likely the engine, a `ScoringPeer`, finds texts."""
        return Score(**self._call(do="score", texts=texts, counted=counted)["score"])

    def close(self) -> None:
        """Ask the process to leave, and see that it does."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _serve(peer_name: str, commands: IO[str], answers: IO[str]) -> None:
    from benchmarks.peers import create_peer

    peer = None
    for line in commands:
        command = json.loads(line)
        action = command.pop("do")
        answer: dict[str, Any]
        try:
            if action == "load":
                peer = create_peer(peer_name)
                answer = {"info": peer.load(Path(command.pop("model_dir")), **command)}
            elif action == "score":
                assert peer is not None, "load comes first"
                answer = {"score": asdict(cast("ScoringPeer", peer).score(**command))}
            else:
                assert peer is not None, "load comes first"
                cpu_before = time.process_time()
                result = peer.run(**command)
                answer = {"cpu_s": time.process_time() - cpu_before, "result": result.to_json()}
        except PeerUnavailable as reason:
            answer = {"unavailable": str(reason)}
        except Exception as error:  # noqa: BLE001  (the parent decides what to do)
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    if peer is not None:
        peer.close()


def main() -> None:
    """Entry point of the worker process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints must not end up among the answers
    _serve(arguments.peer, sys.stdin, answers)
    answers.close()
    sys.stderr.flush()
    os._exit(0)  # an engine's leftover threads must not keep the process alive


if __name__ == "__main__":
    main()
