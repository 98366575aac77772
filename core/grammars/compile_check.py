"""A process that tries to compile a grammar: it comes in on standard input, and what is wrong with it goes out.

Run as a script of its own (`core.grammars.compiler` starts it): some grammars of a few hundred bytes take hours or all
memory to compile, and only a process can be ended. It knows no vocabulary.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MEMORY_BYTES = 1 << 30
"""Address space, llguidance's own threads included."""


def limits(llguidance: Any) -> Any:
    """What a grammar may take, while it is compiled and at each token; the same everywhere."""
    return llguidance.LLParserLimits(max_grammar_size=200_000, max_lexer_states=50_000, verbose_errors=False)


def main() -> None:
    if sys.platform != "win32":
        import resource

        seconds = int(sys.argv[2])
        for kind, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, MEMORY_BYTES)):
            most = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))
    import llguidance

    grammar = sys.stdin.buffer.read().decode()
    error = llguidance.LLMatcher.validate_grammar(grammar, None, limits=limits(llguidance))
    sys.stdout.write(json.dumps("" if error.startswith("WARNING") else error))


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    main()
