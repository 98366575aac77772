"""Masters and workers on machines of their own, with cables between them: namespaces, where there may be some."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from cli.cluster_programs import Program, Programs
from steering import until

from benchmarks.namespaces import Machine, Network, lacking

LACKING = lacking()
pytestmark = pytest.mark.skipif(LACKING is not None, reason=f"no network namespaces: {LACKING}")

CLUSTER_PORT, WORKER_PORTS, MDNS_PORT = 5040, range(5041, 5142), 5353
LONG = 700
HOLD_5353 = "import socket; s = socket.socket(2, 2); s.bind(('', 5353)); print('held', flush=True); input()"


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


@pytest.fixture
def programs(tmp_path: Path, network: Network) -> Iterator[Programs]:
    made = Programs(tmp_path)
    yield made
    made.close()


def start_master(programs: Programs, network: Network, *flags: str) -> tuple[Program, str]:
    """On the bridge, with the usual port; the second is the API's address."""
    master = programs.start(
        "master", "--api", "--cluster-master", "--cluster-interface", network.interface, "--port", "0",
        "--metrics-port", "0", *flags,
    )  # fmt: skip
    return master, master.says(r"API +(http://127\.0\.0\.1:\d+)/v1")[1]


def start_worker(programs: Programs, master: Program, machine: Machine) -> Program:
    """With the very line that the master shows."""
    shown = master.says(r"VRM_CLUSTER_TOKEN=(\S+) python -m vramancer\.main (--cluster-worker)\n")
    return programs.start(machine.name, shown[2], within=machine.command, VRM_CLUSTER_TOKEN=shown[1])


def wait_for_nodes(programs: Programs, url: str, count: int) -> list[str]:
    """Names of all but the master, once they are there."""
    until(lambda: len(programs.ask(url, "/api/nodes")["nodes"]) == count + 1, f"{count} workers")
    return [node["hostname"] for node in programs.ask(url, "/api/nodes")["nodes"][1:]]


def place(programs: Programs, url: str, devices: list[str]) -> None:
    named = ",".join("cpu=1GiB" if device == "cpu" else device for device in devices)
    body = {"devices": named, "placement": "balanced"}
    placed = programs.ask(url, "/api/pipeline/place", body)
    assert {stage["device"] for stage in placed["stages"]} == set(devices)


@pytest.mark.parametrize("how", ["mdns", "broadcast"])
def test_a_worker_finds_its_master(programs: Programs, network: Network, how: str) -> None:
    machine = network.add()
    holder = None
    if how == "mdns":
        machine.without_broadcasts()
    else:
        holder = subprocess.Popen(
            machine.command("python3", "-c", HOLD_5353), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        master, url = start_master(programs, network, "--devices", "cpu=1GiB")
        worker = start_worker(programs, master, machine)
        found = worker.says(r"a master has been found .*?by=(\S+)")
        assert re.sub(r"\x1b\[\d*m", "", found[1]) == how
        assert len(wait_for_nodes(programs, url, 1)) == 1
    finally:
        if holder is not None:
            holder.communicate("")


def test_three_machines_serve_one_model_over_their_cables(programs: Programs, network: Network) -> None:
    machines = [network.add(), network.add()]
    master, url = start_master(programs, network, "--devices", "cpu=1GiB")
    workers = [start_worker(programs, master, machine) for machine in machines]
    names = wait_for_nodes(programs, url, 2)
    links = [node["link"] for node in programs.ask(url, "/api/nodes")["nodes"][1:]]
    assert [(link["interface"], link["kind"]) for link in links] == [(network.interface, "virtual")] * 2
    before = programs.answer(url)
    for devices in (["cpu", *(f"{name}/cpu#0" for name in names)], [f"{name}/cpu#0" for name in reversed(names)]):
        place(programs, url, devices)
        assert programs.answer(url) == before
    for machine in machines:
        assert ports_of(machine) == {(machine.address, True)}
    here = {(each.laddr.ip, each.laddr.port, each.type) for each in listening(master)}
    api = int(url.rpartition(":")[2])
    assert (network.address, CLUSTER_PORT, socket.SOCK_STREAM) in here
    others = {each for each in here if each[1] not in (CLUSTER_PORT, MDNS_PORT)}
    assert ("127.0.0.1", api, socket.SOCK_STREAM) in others
    assert {address for address, _, _ in others} == {"127.0.0.1"}
    assert {each[0] for each in here if each[1] == CLUSTER_PORT and each[2] == socket.SOCK_STREAM} == {network.address}
    workers[0].process.send_signal(signal.SIGINT)
    assert workers[0].process.wait() == 0, workers[0].said
    assert programs.answer(url) == before


def listening(program: Program) -> list[psutil._common.pconn]:
    """Sockets of a process that wait for others."""
    found = psutil.Process(program.process.pid).net_connections("inet4")
    return [each for each in found if each.status == psutil.CONN_LISTEN or each.type == socket.SOCK_DGRAM]


def ports_of(machine: Machine) -> set[tuple[str, bool]]:
    """Addresses that something listens on there, and whether on a documented port."""
    said = subprocess.run(machine.command("ss", "-Hltn"), check=True, capture_output=True, text=True).stdout
    found = [line.split()[3].rpartition(":") for line in said.splitlines()]
    return {(address, int(port) in WORKER_PORTS) for address, _, port in found}


def test_a_cable_that_is_pulled_changes_no_answer(programs: Programs, network: Network) -> None:
    machine = network.add()
    master, url = start_master(programs, network, "--devices", "cpu=1GiB")
    start_worker(programs, master, machine)
    (name,) = wait_for_nodes(programs, url, 1)
    expected = programs.answer(url, LONG)
    place(programs, url, ["cpu", f"{name}/cpu#0"])
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(programs.answer, url, LONG)
        until(lambda: programs.ask(url, "/api/queue/status")["running"], "it runs")
        machine.pull()
        assert answer.result() == expected
    until(lambda: programs.homes(url) == ["cpu"], "its layers are elsewhere")
    machine.plug_in()
    assert wait_for_nodes(programs, url, 1) == [name], "it comes back by itself"
    place(programs, url, [f"{name}/cpu#0", "cpu"])
    assert programs.answer(url, LONG) == expected
    assert "Traceback" not in json.dumps([each.said for each in programs.running])
