"""Machines on one machine: network namespaces of Linux behind a bridge. Needs root, `ip` and `tc`.

This process stays where it is, with an address on the bridge. What is started on a `Machine` sees its own network
alone: one Ethernet interface, and loopback.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from types import TracebackType

_PREFIX = "vrm"
_BURST_BYTES = 128 << 10
"""That tbf lets through at once."""
_QUEUE_MS = 50


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def lacking() -> str | None:
    """Why there can be none here; None if there can."""
    if sys.platform != "linux":
        return "not Linux"
    if os.geteuid() != 0:
        return "not root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    name = f"{_PREFIX}-{uuid.uuid4().hex[:6]}"
    try:
        _run("ip", "netns", "add", name)
        try:
            _run("ip", "-n", name, "link", "add", "end0", "type", "veth", "peer", "name", "end1")
            _run("ip", "-n", name, "link", "add", "bridge0", "type", "bridge")
        finally:
            _run("ip", "netns", "del", name)
    except subprocess.CalledProcessError as error:
        return error.stderr.decode().strip() or f"{error.cmd} fails"
    return None


def _address(*given: str) -> None:
    """The program and its options, an address, and the interface that gets it."""
    *program, address, interface = given
    broadcast = f"{address.rpartition('.')[0]}.255"
    _run(*program, "address", "add", f"{address}/24", "broadcast", broadcast, "dev", interface)


class Machine:
    """A namespace with a cable to the bridge."""

    def __init__(self, name: str, port: str, address: str, broadcast: str) -> None:
        self.name, self.address = name, address
        self._port, self._broadcast = port, broadcast

    def command(self, *command: str) -> list[str]:
        """What runs a command there."""
        return ["ip", "netns", "exec", self.name, *command]

    def shape(self, megabits_s: float) -> None:
        """As fast as such a link, both ways."""
        shaping = ["tbf", "rate", f"{megabits_s}mbit", "burst", str(_BURST_BYTES), "latency", f"{_QUEUE_MS}ms"]
        _run("tc", "qdisc", "replace", "dev", self._port, "root", *shaping)
        _run("tc", "-n", self.name, "qdisc", "replace", "dev", "eth0", "root", *shaping)

    def pull(self) -> None:
        """The cable."""
        _run("ip", "link", "set", self._port, "down")

    def plug_in(self) -> None:
        """The cable."""
        _run("ip", "link", "set", self._port, "up")

    def without_broadcasts(self) -> None:
        """None leaves it any more."""
        _run("ip", "-n", self.name, "route", "del", "broadcast", self._broadcast, "dev", "eth0", "table", "local")


class Network:
    """A bridge, with `address` for this process, and machines behind it. A context."""

    def __init__(self) -> None:
        """Raises `CalledProcessError`."""
        number = uuid.uuid4().int
        self._id = f"{number & 0xFFFFFF:06x}"
        self._subnet = f"10.{64 + (number >> 24) % 64}.{(number >> 32) % 256}"
        self.interface, self.address = f"{_PREFIX}{self._id}", f"{self._subnet}.1"
        self.machines: list[Machine] = []
        _run("ip", "link", "add", self.interface, "type", "bridge")
        try:
            _address("ip", self.address, self.interface)
            _run("ip", "link", "set", self.interface, "up")
        except BaseException:
            self.close()
            raise

    def add(self) -> Machine:
        """One more machine."""
        number = len(self.machines) + 2
        name, port = f"{_PREFIX}-{self._id}-{number}", f"{_PREFIX}{self._id}{number}"
        machine = Machine(name, port, f"{self._subnet}.{number}", f"{self._subnet}.255")
        _run("ip", "netns", "add", name)
        self.machines.append(machine)
        _run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", port, "master", self.interface)
        _run("ip", "link", "set", port, "up")
        _address("ip", "-n", name, machine.address, "eth0")
        for interface in ("lo", "eth0"):
            _run("ip", "-n", name, "link", "set", interface, "up")
        return machine

    def close(self) -> None:
        """What runs there has ended."""
        for machine in self.machines:
            _run("ip", "netns", "del", machine.name)
        _run("ip", "link", "del", self.interface)

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
