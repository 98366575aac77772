"""Frames and messages between machines with something wrong in them: nothing but a refusal may come of it.

    python -m benchmarks.fuzz_frames --minutes 60 --seed 0

Valid frames of every opcode, with the payloads that they have in use, are cut, joined, repeated and changed, half of
them with checksums that fit what was changed, so that what lies behind the checksums is reached too. They are given to
the parser of headers, to the decoders of all messages, to both sides of a handshake, and over a connection to each kind
of link's end. The run fails on anything that is raised but a refusal, on a link that does not end when its connection
does, on threads that are left, and on memory that grows. It prints what it did, and of a failure the bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from core.cluster.block_calls import BlockCalls
from core.cluster.block_wire import ANSWER_BYTES, HEAD_BYTES, read_answer, read_pages, read_wanted
from core.cluster.calls import CallEnd, Fault
from core.cluster.failures import Failure, decode_failure, encode_failure
from core.cluster.group_path import Has
from core.cluster.guest_calls import GuestCalls
from core.cluster.guest_wire import Pages, pages_head, query_head, read_query, read_site, site_tables
from core.cluster.guest_wire import read_pages as read_guest_pages
from core.cluster.guests import GuestForm, Guests, GuestsEnd
from core.cluster.hosted_stage import NodeEnd
from core.cluster.kept_blocks import BlocksEnd, KeptBlocks
from core.cluster.lending_messages import AddGuest, Borrow, DropGuest, ExpectGuests, LayerPages, WorkerPlace
from core.cluster.message_types import Nothing
from core.cluster.messages import Ask, Call, Connect, Epoch, Keep, Leave, Lend, Reach, ReadFile, Refuse, Release, Report
from core.cluster.remote_stage import MasterEnd
from core.cluster.stage_wire import read_results, read_step
from core.config import LoggingSettings, Settings
from core.decoding import UNREADABLE
from core.devices import DeviceBudget, host_device
from core.devices.readings import DeviceReading
from core.errors import NetworkError
from core.execution.attention.metadata import AttentionSpec, build_site_batch
from core.execution.attention.torch_paged import TorchPagedAttention
from core.execution.codec import encode
from core.execution.records import StepOutput
from core.kv_cache.page_ops import PageCopy, StagePart
from core.logs import configure_logging
from core.models.architecture import KVShape
from core.network.frames import HEADER_BYTES, Flag, Header, Opcode, checksum, read_header, write_header
from core.network.greeting import answer, frame, greet
from core.network.handshake import (
    Challenge,
    Hello,
    Proof,
    Refused,
    decode_message,
    derive_key,
    encode_message,
    new_nonce,
)
from core.network.link import Link
from core.transfer import TransferManager

KEY, NODE = derive_key("only for this measurement"), "a" * 32
STAGE = 1
LINKS_EACH = 40
"""So many inputs of decoders come on one connection: those take longer."""
GROWTH_BYTES = 256 << 20
LENDING = Settings.model_validate({"cluster": {"memory_bytes": 1024}})
PATIENCE_S = 60.0
_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)

REGION = 1
FORM = GuestForm({0: KVShape(2, 8, 8)}, 4, torch.float32)
FORM_BYTES = 4 * 2 * 16 * 4
"""Of a page."""
ONE_KEY = build_site_batch(
    [np.array([2], np.int32)], [np.array([0], np.int32)], [1], [1], np.array([0]), 4, torch.device("cpu")
)

Payload = tuple[Opcode, bytes, str, tuple[int, ...]]


def one_guest() -> Guests:
    """A lender with four pages of one layer."""
    guests, device = Guests(), host_device(1 << 20)
    backend = TorchPagedAttention()
    guests.add(STAGE, REGION, 4, device, DeviceBudget(device), FORM, lambda device: backend, TransferManager())
    return guests


class Deaf:
    """A stage that takes whatever arrives."""

    def take(self, header: Header, what: torch.Tensor | memoryview) -> None:
        if header.opcode is Opcode.RESULTS:
            assert isinstance(what, memoryview)
            read_results(what)
        elif header.opcode is Opcode.FAILED:
            assert isinstance(what, memoryview)
            decode_failure(what)

    def tell(self, *what: object) -> None: ...

    def arrive(self, *what: object) -> None: ...

    def lose(self, error: NetworkError) -> None: ...


def payloads() -> list[Payload]:
    """What frames have in use."""
    pack = msgspec.msgpack.encode
    calls = [Epoch(3), Release((1, 2)), Reach("b" * 32, "10.0.0.2", 5041), Connect(1, "desk/cpu", True, None, 0, False),
             Refuse("no"), Keep(2, 1, 64), Lend(3), DropGuest(4, 1), Borrow(4, 1, 8, "desk/cpu", None),
             Borrow(4, 1, 8, "desk/cpu", WorkerPlace("b" * 32, "10.0.0.2", 5041)),
             AddGuest(4, 1, "cpu", 8, (LayerPages(0, 2, 8, 8),), 4, "float32", {}),
             ExpectGuests(("cpu",), (LayerPages(0, 2, 8, 8),), 4, False, 4, "float32", {})]  # fmt: skip
    asked = [ReadFile("c" * 32, "model.safetensors", 0, 1 << 20), Leave()]
    part = encode(StagePart((PageCopy((0, 1), (0, 2)),), np.array([[1, 0, 2]], np.int32)))
    output = encode(StepOutput(step=1))
    found: list[Payload] = [(Opcode.CALL, pack(call), "bytes", ()) for call in (*calls, *asked)]
    found += [
        (Opcode.ANSWER, b"\0" + pack(Nothing()), "bytes", ()),
        (Opcode.ANSWER, b"\1" + pack(Fault("DeviceError", "no")), "bytes", ()),
        (Opcode.REPORT, pack(Report((DeviceReading("cpu", used_bytes=1),))), "bytes", ()),
        (Opcode.STEP, len(part).to_bytes(4, "little") + part + part, "bytes", ()),
        (Opcode.RESULTS, output, "bytes", ()),
        (Opcode.FAILED, encode_failure(Failure("failed", "broke", "cpu")), "bytes", ()),
        (Opcode.SKIP, encode_failure(Failure("pages", "broke", "cpu")), "bytes", ()),
        (Opcode.HIDDEN, bytes(64), "bfloat16", (1, 4, 8)),
        (Opcode.PASS, b"", "bytes", ()),
        (Opcode.KV_PAGES, bytes(HEAD_BYTES + 64), "bytes", ()),
        (Opcode.KV_WANTED, bytes(HEAD_BYTES), "bytes", ()),
        (Opcode.KV_ANSWER, bytes(ANSWER_BYTES), "bytes", ()),
        (Opcode.KV_PAGES, pages_head(Pages(REGION, (0, 3), ())) + bytes(2 * FORM_BYTES), "bytes", ()),
        (Opcode.KV_WANTED, pages_head(Pages(REGION, (1,), (0,))), "bytes", ()),
        (Opcode.SITE, site_tables(((REGION, ONE_KEY),)), "bytes", ()),
        (Opcode.QUERY, query_head(1, 0, torch.zeros(1, 2, 8), AttentionSpec(1.0)) + bytes(64), "bytes", ()),
        (Opcode.PARTIAL, bytes(72), "float32", (1, 2, 9)),
        (Opcode.HEARTBEAT, b"", "bytes", ()),
        (Opcode.CREDIT, b"", "bytes", ()),
        (Opcode.BYE, b"bye", "bytes", ()),
        (Opcode.ECHO, bytes(32), "bytes", ()),
        (Opcode.GROUP, b"0/1\0value", "bytes", ()),
        (Opcode.GROUP, pack(Has("host", "gpu", "nccl")), "bytes", ()),
        (Opcode.REACH, b"", "bytes", ()),
        (Opcode.REGION, bytes(64), "bytes", ()),
        (Opcode.TAKEN, b"", "bytes", ()),
        (Opcode.PROBE, bytes(32), "bytes", ()),
        (Opcode.PROBED, b"", "bytes", ()),
        (Opcode.HELLO, encode_message(Hello("control", NODE, new_nonce())), "bytes", ()),
        (Opcode.CHALLENGE, encode_message(Challenge(NODE, new_nonce())), "bytes", ()),
        (Opcode.PROOF, encode_message(Proof(bytes(32))), "bytes", ()),
        (Opcode.REFUSED, encode_message(Refused("no")), "bytes", ()),
    ]  # fmt: skip
    return found


def changed(data: bytes, dice: random.Random) -> bytes:
    """Some bytes of it are others, or fewer, or more."""
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 3, 8))):
        at = dice.randrange(len(found) + 1)
        kind = dice.randrange(6)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << dice.randrange(8)
        elif kind == 1 and found:
            found[at % len(found)] = dice.choice(_INTERESTING)
        elif kind == 2:
            del found[at : at + dice.randrange(1, 9)]
        elif kind == 3:
            found[at:at] = dice.randbytes(dice.randrange(1, 9))
        elif kind == 4:
            found[at:at] = found[at : at + dice.randrange(1, 17)]
        else:
            del found[at:]
    return bytes(found)


def framed(payload: Payload, sequence: int, dice: random.Random) -> bytes:
    """A frame, half of the time with something wrong that its checksums do not tell."""
    opcode, data, dtype, shape = payload
    wrong = dice.random() < 0.5
    if wrong and dice.random() < 0.7:
        data, dtype, shape = changed(data, dice), "bytes", ()
    header = Header(
        opcode, Flag.CHECKED, 0, 1, 2, dice.randrange(3), STAGE, dtype, shape, sequence, len(data), checksum((data,))
    )
    head = bytearray(write_header(header))
    if wrong and dice.random() < 0.5:
        head[dice.randrange(4, 60)] = dice.choice((*_INTERESTING, dice.randrange(256)))
        head[60:] = checksum((bytes(head[:60]),)).to_bytes(4, "little")
    made = bytes(head) + data
    return changed(made, dice) if dice.random() < 0.2 else made


# -- what is given them -----------------------------------------------------------------------------------------------


def decoders() -> dict[str, Callable[[bytes], Any]]:
    """All that reads what another machine sent, by name; each may refuse."""
    found: dict[str, Callable[[bytes], Any]] = {
        "headers": lambda data: read_header(data[:HEADER_BYTES]),
        "steps": lambda data: read_step(memoryview(data)),
        "results": lambda data: read_results(memoryview(data)),
        "failures": lambda data: decode_failure(memoryview(data)),
        "blocks": lambda data: read_pages(memoryview(data)),
        "wanted blocks": lambda data: read_wanted(memoryview(data)),
        "answers of blocks": lambda data: read_answer(memoryview(data)),
        "pages of guests": lambda data: read_guest_pages(memoryview(data)),
        "sites": lambda data: read_site(memoryview(data)),
        "queries": lambda data: read_query(memoryview(bytearray(data))),
    }
    greetings: tuple[Any, ...] = (Hello, Challenge, Proof, Refused)
    for kind in greetings:
        found[kind.__name__] = partial(decode_message, kind=kind)
    for name, kinds in {"calls": Call, "questions": Ask, "reports": Report, "faults": Fault}.items():
        decoder = msgspec.msgpack.Decoder(kinds)
        found[name] = decoder.decode
    return found


def over_links(stream: bytes, dice: random.Random) -> str | None:
    """Why a link did not end as it should have; None if it did."""
    ours, theirs = socket.socketpair()
    ended: list[NetworkError] = []
    over = threading.Event()

    def lost(error: NetworkError) -> None:
        ended.append(error)
        over.set()

    stage: Any = Deaf()
    kind = dice.randrange(7)
    handler: Any
    if kind == 0:
        handler = CallEnd(Call, lambda call: Nothing(), lost, "fuzz", lambda report: None)
    elif kind == 3:
        handler = BlockCalls(lost)
    elif kind == 4:
        kept = KeptBlocks(LENDING, DeviceBudget(host_device()), has_cards=False)
        kept.lend(STAGE)
        handler = BlocksEnd(kept.memories, lost)
    elif kind == 5:
        handler = GuestsEnd(one_guest(), lost)
    elif kind == 6:
        handler = GuestCalls(lost)
    else:
        handler = MasterEnd({STAGE: stage}) if kind == 1 else NodeEnd({STAGE: stage}, lost)
        if kind == 1:
            handler.lost = lost
    link = Link(ours, 1, 2, handler, name="fuzz")
    handler.attach(link)
    link.start()
    drain = threading.Thread(target=_drain, args=(theirs,))
    drain.start()
    try:
        theirs.sendall(stream)
        theirs.shutdown(socket.SHUT_WR)
    except OSError:  # it has ended already
        pass
    came = over.wait(PATIENCE_S)
    link.close()
    theirs.close()
    drain.join()
    if kind in (1, 2):
        handler.path.close()
    if kind == 0:
        handler.close()
    if not came:
        return "it goes on"
    return f"{ended[0]!r}" if type(ended[0]) is NetworkError else None


def _drain(sock: socket.socket) -> None:
    try:
        while sock.recv(1 << 16):
            pass
    except OSError:
        pass


def over_handshakes(said: bytes) -> None:
    """To a listener, and to a caller. Raises what they raise, which may be a refusal."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        ours.setblocking(False)
        with contextlib.suppress(NetworkError):
            asyncio.run(answer(ours, KEY, NODE, None))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        greet(ours, KEY, NODE, "control", timeout_s=PATIENCE_S)


REFUSALS = (NetworkError, *UNREADABLE)


class Run:
    """Counts, and keeps the first failure of each target."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.given: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self._known, self._decoders = payloads(), decoders()

    def turn(self) -> None:
        """One stream for a link, one handshake, and many inputs of decoders."""
        for _ in range(LINKS_EACH):
            name = self.dice.choice(list(self._decoders))
            data = changed(self.dice.choice(self._known)[1], self.dice)
            if name == "headers":
                data = framed(self.dice.choice(self._known), 0, self.dice)[:HEADER_BYTES]
            self._try(name, data, self._decoders[name])
        frames = [framed(self.dice.choice(self._known), at, self.dice) for at in range(self.dice.randrange(1, 9))]
        stream = b"".join(frames)
        self.given["links"] += 1
        found = over_links(stream, self.dice)
        if found is not None:
            self.failures.setdefault("links", f"{found}: {stream.hex()}")
        said = b"".join(framed(self.dice.choice(self._known), 0, self.dice) for _ in range(self.dice.randrange(1, 4)))
        if self.dice.random() < 0.5:
            said = frame(Opcode.HELLO, encode_message(Hello("control", NODE, new_nonce()))) + said
        self._try("handshakes", said, over_handshakes)

    def _try(self, name: str, data: bytes, target: Callable[[bytes], Any]) -> None:
        self.given[name] += 1
        try:
            target(data)
            self.taken[name] += 1
        except REFUSALS:
            pass
        except Exception as error:  # noqa: BLE001  this is what is looked for
            self.failures.setdefault(name, f"{error!r}: {data.hex()}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz_frames", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is changed (default: %(default)s)")
    options = parser.parse_args()
    configure_logging(LoggingSettings(level="error"))
    console, run, process = Console(), Run(options.seed), psutil.Process()
    unheard: list[str] = []
    threading.excepthook = lambda what: unheard.append(repr(what.exc_value))
    for _ in range(20):
        run.turn()
    threads, resident, began_s = threading.active_count(), process.memory_info().rss, time.monotonic()
    while time.monotonic() - began_s < options.minutes * 60 and not run.failures and not unheard:
        run.turn()
    grown = process.memory_info().rss - resident
    table = Table(title=f"{(time.monotonic() - began_s) / 60:.1f} minutes, seed {options.seed}")
    for name in ("what reads it", "inputs", "of these accepted"):
        table.add_column(name, justify="left" if name == "what reads it" else "right")
    for name, count in sorted(run.given.items()):
        table.add_row(name, f"{count:,}", f"{run.taken[name]:,}" if name in run.taken else "")
    console.print(table)
    console.print(f"memory grew by {grown / 1e6:.1f} MB, {threading.active_count() - threads} threads more")
    for name, what in run.failures.items():
        console.print(f"{name}: {what}", soft_wrap=True)
    for what in unheard:
        console.print(f"a thread ended with {what}")
    bad = run.failures or unheard or grown > GROWTH_BYTES or threading.active_count() > threads
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
