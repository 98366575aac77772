"""Which of this machine's addresses the cluster uses."""

from __future__ import annotations

import socket

from core.errors import ConfigError
from core.network.discovery import addresses

LOOPBACK = "127.0.0.1"
_ELSEWHERE = ("192.0.2.1", 9)
"""An address for documentation, which is on no network: what leads there is what leads anywhere."""


def cluster_address(chosen: str | None) -> str:
    """The IPv4 address of the interface that is `chosen`, or the address itself. None: of the interface that other
    networks are reached by, else of the first that is up, else loopback.

    Raises:
        ConfigError: this machine has no such interface or address.
    """
    known = addresses()
    if chosen is None:
        return _outward() or next((each for each in known if not each.startswith("127.")), LOOPBACK)
    if chosen in known:
        return chosen
    of_interface = [address for address, (interface, _) in known.items() if interface == chosen]
    if of_interface:
        return of_interface[0]
    there = ", ".join(f"{interface} ({address})" for address, (interface, _) in known.items()) or "none"
    raise ConfigError(
        f"cluster.interface: {chosen!r} is no interface that is up with an IPv4 address, and no such address. "
        f"There are: {there}."
    )


def _outward() -> str | None:
    """Nothing is sent to find out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(_ELSEWHERE)
        except OSError:
            return None
        address = sock.getsockname()[0]
    return None if address == "0.0.0.0" else str(address)
