"""Whether a request may go on, as far as its head tells: what the server in front asks before it reads a body or gives
the request a thread, and what it tells the application through the WSGI environment."""

from __future__ import annotations

from dataclasses import dataclass

REFUSAL_KEY = "vramancer.refusal"
"""The error to answer with, although the request itself could go on."""
STOPPING_KEY = "vramancer.stopping"
"""Whether the server finishes what it has begun, and takes nothing new."""
DISCONNECTED_KEY = "vramancer.disconnected"
"""A function that says whether the client has left."""


@dataclass(frozen=True, slots=True)
class Admission:
    """`granted`: there is such a route, and the caller may use it; otherwise the application says what is wrong, and
    needs no body for it. `waits`: its answer may take as long as a generation. `manages`: it does not give way to
    generations. `public`: it needs no token."""

    granted: bool
    waits: bool = False
    manages: bool = False
    public: bool = False


REFUSED = Admission(granted=False)
