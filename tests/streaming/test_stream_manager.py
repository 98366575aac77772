"""`StreamManager` by itself: which layer is loaded into which slot, and when."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from fake_runtime import FakeRuntime
from steering import LONGEST_WAIT_S
from torch import nn

from core.devices import HOST, Device, DeviceBudget, pinned
from core.devices.device import DeviceKind
from core.errors import OutOfDeviceMemoryError
from core.streaming.stream import StreamedLayers, StreamManager

WIDTH = 8
LAYER_BYTES = 4 * WIDTH * WIDTH + 4 * WIDTH


class Recorder:
    """Copies, and remembers what; waits for `gate` first."""

    def __init__(self) -> None:
        self.loads: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.masters: list[torch.Tensor] = []

    def load(self, source: torch.Tensor, target: torch.Tensor, device: Device, after: object) -> None:
        assert self.gate.wait(LONGEST_WAIT_S)
        target.copy_(source)
        self.loads.append(next(i for i, master in enumerate(self.masters) if master is source))


class NoClock:
    def reach(self, layer: int) -> None: ...

    def resume(self) -> None: ...


class Rig:
    """A stack of linear layers of which some stream."""

    def __init__(self, number: int, streamed: tuple[int, ...], kind: DeviceKind = "cpu") -> None:
        torch.manual_seed(number)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(number))
        self.x = torch.randn(3, WIDTH)
        with torch.inference_mode():
            self.expected = self.run()
        self.device = DeviceBudget(Device(kind, 0, kind, "cpu", 100_000))
        self.host = DeviceBudget(Device(HOST, 0, "cpu", "cpu", 100_000))
        self.loader = Recorder()
        self.loader.gate.clear()
        sizes = StreamedLayers(streamed, LAYER_BYTES * len(streamed), LAYER_BYTES, self.host, self.loader)
        self.manager = StreamManager(sizes, self.device.device, self.device, NoClock())
        self.manager.adopt({index: self.layers[index] for index in streamed})
        self.loader.masters = self.manager._masters
        self.loader.gate.set()

    @torch.inference_mode()
    def run(self, until: int | None = None) -> torch.Tensor:
        """A pass, or its first layers."""
        x = self.x
        for layer in self.layers[:until]:
            x = torch.tanh(layer(x))
        return x

    def check(self) -> None:
        assert torch.equal(self.run(), self.expected)


@pytest.fixture
def rigs() -> Iterator[list[Rig]]:
    made: list[Rig] = []
    yield made
    for rig in made:
        rig.manager.close()
        assert rig.device.used_bytes == rig.host.used_bytes == 0
        rig.manager.close()


@pytest.mark.parametrize("streamed", [(0,), (1, 3), (0, 1, 2), (0, 2, 4, 5), (0, 1, 2, 3, 4), (1, 2, 3, 4, 5, 7)])
def test_every_pass_gives_what_the_resident_layers_gave(rigs: list[Rig], streamed: tuple[int, ...]) -> None:
    rig = Rig(8, streamed)
    rigs.append(rig)
    for _ in range(6):
        rig.check()


@pytest.mark.parametrize(
    ("number", "loads"),
    [
        (2, [0, 1]),  # each has a slot to itself
        (3, [0, 1, 2, 0, 2, 0]),
        (4, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]),
        (5, [0, 1, 2, 3, 4, 1, 0, 2, 3, 4, 1, 0]),
    ],
)
def test_the_order_of_loads_over_two_passes(rigs: list[Rig], number: int, loads: list[int]) -> None:
    rig = Rig(number, tuple(range(number)))
    rigs.append(rig)
    for _ in range(2):
        rig.check()
    rig.manager._thread.shutdown(wait=True)  # type: ignore[union-attr]
    got = rig.loader.loads
    if number == 5:  # 4 and 1 share no slot: which of them comes free first is not decided
        assert sorted(got) == sorted(loads)
    else:
        assert got == loads


def test_passes_that_end_anywhere_do_no_harm(rigs: list[Rig]) -> None:
    rig = Rig(9, (0, 2, 3, 4, 6, 8))
    rigs.append(rig)
    source = random.Random(2)
    for _ in range(60):
        rig.run(until=source.randrange(10))
        if source.random() < 0.5:
            rig.check()
    rig.check()


def test_a_layer_waits_for_its_bytes(rigs: list[Rig]) -> None:
    rig = Rig(4, (0, 1, 2, 3))
    rigs.append(rig)
    rig.check()
    rig.loader.gate.clear()
    done = threading.Event()
    results: list[torch.Tensor] = []

    def run() -> None:
        results.append(rig.run())
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert not done.wait(0.1)
    rig.loader.gate.set()
    thread.join(LONGEST_WAIT_S)
    assert torch.equal(results[0], rig.expected)
    assert rig.manager.wait_s > 0


def test_closing_with_loads_pending_ends_the_thread(rigs: list[Rig]) -> None:
    rig = Rig(4, (0, 1, 2, 3))
    rigs.append(rig)
    rig.check()
    rig.manager.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vrm-stream")]
    assert rig.layers[0]._forward_hooks == {}


def test_more_than_was_planned_is_reserved_or_refused() -> None:
    """Adapters may make a layer larger than its parameters were."""
    host, layer = DeviceBudget(Device(HOST, 0, "cpu", "cpu", 10_000)), nn.Linear(WIDTH, WIDTH)
    for room, fits in ((2 * LAYER_BYTES, True), (2 * LAYER_BYTES - 1, False)):
        budget = DeviceBudget(Device("cpu", 0, "cpu", "cpu", room))
        streamed = StreamedLayers((0,), 10, 10, host, Recorder())
        manager = StreamManager(streamed, budget.device, budget, NoClock())
        assert budget.used_bytes == 20
        if fits:
            manager.adopt({0: layer})
            assert (budget.used_bytes, host.used_bytes) == (2 * LAYER_BYTES, LAYER_BYTES)
        else:
            with pytest.raises(OutOfDeviceMemoryError):
                manager.adopt({0: layer})
        manager.close()
        assert budget.used_bytes == host.used_bytes == 0


def test_for_a_gpu_the_layers_wait_in_registered_memory(rigs: list[Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(pinned, "gpu_runtime", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    rig = Rig(4, (0, 1, 2, 3), "cuda")
    rigs.append(rig)
    assert list(runtime.registered) == [rig.manager._masters[0].data_ptr()]
    rig.check()
    rig.manager.close()
    assert runtime.registered == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_stream_to_a_gpu() -> None:
    from core.transfer import TransferManager

    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(12))
    x = torch.randn(64, 1024)
    with torch.inference_mode():
        expected = x
        for layer in layers:
            expected = torch.tanh(layer(expected))
    sizes = 4 * 1024 * 1025
    host = DeviceBudget(Device(HOST, 0, "cpu", "cpu", 12 * sizes))
    budget = DeviceBudget(Device("cuda:0", 0, "cuda", "cuda:0", 2 * sizes))
    streamed = StreamedLayers(tuple(range(12)), 12 * sizes, sizes, host, TransferManager())
    manager = StreamManager(streamed, budget.device, budget, NoClock())
    try:
        manager.adopt(dict(enumerate(layers)))
        for _ in range(20):
            y = x.cuda()
            with torch.inference_mode():
                for layer in layers:
                    y = torch.tanh(layer(y))
            torch.testing.assert_close(y.cpu(), expected, rtol=1e-3, atol=1e-3)
    finally:
        manager.close()
