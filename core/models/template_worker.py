"""A process that renders chat templates: jobs come in on standard input, texts go out on standard output.

Run as a script of its own (`core.models.chat_template` starts it), so that memory can be limited and whoever waits can
end it. Both ways a message is a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SPARE_BYTES = 256 * 1024 * 1024
"""Address space for a rendering, beside what its job's own size asks for."""
SPARE_FACTOR = 16
MAX_REASON = 1000


def _render(messages: list[dict[str, Any]], **options: Any) -> str:
    """What `apply_chat_template` does, without its tokenizer, and without leaving out what is null."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(conversations=[messages], **options)
    return str(rendered[0])


def _answer(job: dict[str, Any], limit: int) -> dict[str, Any]:
    try:
        text = _render(**job)
    except MemoryError:
        return {"broke": "needs more memory than a rendering may have"}
    except RecursionError:
        return {"broke": "calls itself too often"}
    except Exception as error:  # noqa: BLE001  a template is a program, and may fail in any way
        return {"error": str(error)[:MAX_REASON] or type(error).__name__}
    if len(text) > limit:
        return {"broke": f"makes {len(text)} characters, and these messages may become {limit}"}
    return {"text": text}


class _Memory:
    """The address space that this process may have. Without limits where the system has none."""

    def __init__(self) -> None:
        self._used = 0
        if sys.platform == "linux":
            pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
            self._used = int(pages) * os.sysconf("SC_PAGE_SIZE")

    def leave(self, spare: int | None) -> None:
        """`spare` bytes more than at the start; None: any number."""
        if sys.platform == "linux":
            import resource

            most = resource.getrlimit(resource.RLIMIT_AS)[1]
            wanted = resource.RLIM_INFINITY if spare is None else self._used + spare
            if most != resource.RLIM_INFINITY:
                wanted = most if spare is None else min(most, wanted)
            resource.setrlimit(resource.RLIMIT_AS, (wanted, most))


def main() -> None:
    jobs = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    import transformers.utils.chat_template_utils  # noqa: F401  the slow part, before the first job

    memory = _Memory()
    answer: Any = "ready"
    while True:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        line = jobs.readline()
        if not line:
            return
        message = json.loads(line)
        memory.leave(SPARE_BYTES + SPARE_FACTOR * len(line))
        answer = _answer(message["job"], message["limit"])
        memory.leave(None)


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    main()
