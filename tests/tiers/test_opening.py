"""From settings to tiers: what is asked for is there, what cannot be had is left out and said."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_store import BrokenStore
from memory_helpers import LAYOUT, InProcessPeer, block, load_bytes, payload, save
from plain_settings import make_settings
from steering import LONGEST_WAIT_S

from core.config import MemorySettings
from core.devices import DeviceBudget, host_device
from core.errors import ConfigError
from core.tiers import HierarchicalMemory, Tier, open_lasting, open_memory, opening
from core.tiers.disk import LocalFiles
from core.tiers.measure import DiskSpeed, measure_peer
from core.tiers.opening import open_peer
from core.tiers.records import TierSpeed


def settings(**values: object) -> MemorySettings:
    defaults = {
        "memory__host_bytes": 8 * LAYOUT.nbytes,
        "memory__disk_bytes": 1 << 20,
        "memory__disk_min_free_bytes": 0,
    }
    return make_settings(**{**defaults, **{f"memory__{name}": value for name, value in values.items()}}).memory


def main_memory(nbytes: int = 1 << 20) -> DeviceBudget:
    return DeviceBudget(host_device(nbytes))


def opened(values: MemorySettings, salt: bytes = b"salt", **options: object) -> HierarchicalMemory:
    memory = open_memory(values, LAYOUT, main_memory(), **options)  # type: ignore[arg-type]
    assert memory is not None
    open_lasting(memory, values, salt)
    return memory


def test_no_host_memory_is_no_hierarchy() -> None:
    assert open_memory(settings(host_bytes=0), LAYOUT, main_memory()) is None


def test_host_memory_by_default_is_a_tenth_of_what_is_free() -> None:
    memory = opened(settings(host_bytes=None))
    assert memory.num_slots == (1 << 20) // 10 // LAYOUT.nbytes
    assert [tier.tier for tier in memory.stats().tiers] == [Tier.L3]
    memory.close()


def test_all_tiers_hold_blocks_and_a_restart_finds_them(tmp_path: Path) -> None:
    values = settings(
        disk_path=tmp_path / "disk", remote_url=str(tmp_path / "remote"), remote_bytes=1 << 20, host_bytes=LAYOUT.nbytes
    )
    memory, peer = opened(values), InProcessPeer(2 * LAYOUT.nbytes)
    memory.add_below([open_peer(values, LAYOUT, peer, measure_peer(peer, LAYOUT.nbytes))])
    assert {tier.tier for tier in memory.stats().tiers} == {Tier.L3, Tier.L4, Tier.L5, Tier.L6}
    assert set(memory.speeds()) == {Tier.L4, Tier.L5, Tier.L6}
    below = [tier.speed.fetch_s(LAYOUT.nbytes) for tier in memory.stats().tiers[1:] if tier.speed is not None]
    assert below == sorted(below), "blocks sink to the fastest tier first"
    disk = next(tier for tier in memory.stats().tiers if tier.tier == Tier.L5)
    assert disk is not None and disk.medium in ("ram disk", "nvme", "ssd", "spinning")
    for number in range(1, 9):
        save(memory, number, number - 1)
        assert memory.flush(LONGEST_WAIT_S)
    assert load_bytes(memory, [block(1)]) == [payload(1)]
    memory.close()
    again = opened(values)
    assert sum(len(again.find([block(number)])) for number in range(1, 9)) >= 5
    again.close()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("below", "read_gb_s", "write_gb_s", "random_read_us"), [(1.0, 1.0, 2.0, 123.4), (-1.0, 1.01, 2.01, 123.5)]
)
def test_the_disks_figures_are_logged_rounded(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    below: float,
    read_gb_s: float,
    write_gb_s: float,
    random_read_us: float,
) -> None:
    """Just below and just above halves of their last digits."""
    speed = TierSpeed(1.005e9 - 0.5 * below, 2.005e9 - 0.5 * below, 123.45e-6 - below * 5e-11)
    monkeypatch.setattr(opening, "measure_directory", lambda _: DiskSpeed(speed, "O_DIRECT", "nvme"))
    caplog.set_level("INFO")
    opened(settings(disk_path=tmp_path)).close()
    (line,) = (record.msg for record in caplog.records if "disk measured" in record.getMessage())
    assert isinstance(line, dict) and (line["medium"], line["method"]) == ("nvme", "O_DIRECT")
    assert (line["read_gb_s"], line["write_gb_s"], line["random_read_us"]) == (read_gb_s, write_gb_s, random_read_us)


def test_another_salt_finds_nothing(tmp_path: Path) -> None:
    memory = opened(settings(disk_path=tmp_path))
    save(memory, 1, 0)
    assert memory.flush(LONGEST_WAIT_S)
    memory.close()
    other = opened(settings(disk_path=tmp_path), b"other")
    assert other.find([block(1)]) == []
    other.close()


def test_int8_halves_what_is_stored_and_changes_the_numbers_a_little(tmp_path: Path) -> None:
    memory = opened(settings(disk_path=tmp_path, kv_quantization="int8", host_bytes=LAYOUT.nbytes))
    disk = next(tier for tier in memory.stats().tiers if tier.tier == Tier.L5)
    assert disk is not None and disk.codec.startswith("int8+")
    memory.close()


def test_a_directory_in_use_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = LocalFiles(tmp_path)
    memory = opened(settings(disk_path=tmp_path))
    assert [tier.tier for tier in memory.stats().tiers] == [Tier.L3]
    assert any("L5 is not used" in record.getMessage() for record in caplog.records)
    assert "in use by another process" in memory.troubles()[Tier.L5]
    memory.close()
    files.close()


def test_a_directory_that_cannot_be_made_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    memory = opened(settings(disk_path=tmp_path / "file" / "below", remote_url=str(tmp_path / "file" / "below")))
    assert [tier.tier for tier in memory.stats().tiers] == [Tier.L3]
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "L5 is not used" in said and "L6 is not used" in said
    memory.close()


@pytest.mark.parametrize("fault", ["open", "makedirs", "list", "read", "write", "delete"])
def test_a_remote_place_whose_driver_fails_is_left_out_and_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(BrokenStore, "fails", frozenset([fault]))
    memory = opened(settings(remote_url="broken://place", remote_bytes=1 << 20))
    assert [tier.tier for tier in memory.stats().tiers] == [Tier.L3]
    assert memory.troubles() == {Tier.L6: f"BackendError: cannot {fault}"}
    assert any("L6 is not used" in record.getMessage() for record in caplog.records)
    save(memory, 1, 0)
    assert load_bytes(memory, [block(1)]) == [payload(1)]
    memory.close()


@pytest.mark.parametrize("values", [{"disk_bytes": 10}, {"remote_url": "nonsense://x"}])
def test_settings_that_cannot_work_are_refused_and_nothing_stays_locked(
    tmp_path: Path, values: dict[str, object]
) -> None:
    with pytest.raises(ConfigError):
        opened(settings(**{"disk_path": tmp_path, **values}))
    LocalFiles(tmp_path).close()
