"""From settings to a hierarchy: which tiers there are, how large, and how fast they were measured to be."""

from __future__ import annotations

import hashlib
import shutil

from core.config import MemorySettings
from core.devices import DeviceBudget, format_bytes
from core.errors import ConfigError, ConflictError
from core.logs import get_logger
from core.tiers.compress import Compressor
from core.tiers.disk import LocalFiles
from core.tiers.hierarchy import HierarchicalMemory
from core.tiers.hotness import HeatModel
from core.tiers.lower_tier import LowerTier
from core.tiers.measure import measure_directory, measure_files, measure_host
from core.tiers.parts import BlockParts
from core.tiers.peer import Peer, PeerBlock, PeerStore
from core.tiers.policy import MemoryOptions
from core.tiers.records import BlockLayout, Tier, TierSpeed
from core.tiers.remote import RemoteFiles, check_url
from core.tiers.segment_store import SegmentStore
from core.tiers.segments import Identity, SegmentSizes

logger = get_logger(__name__)

AUTOMATIC_SHARE = 0.1
MOST_AUTOMATIC_SLOTS = 1 << 17


def open_memory(
    settings: MemorySettings,
    layout: BlockLayout,
    host: DeviceBudget,
    *,
    pin: bool = False,
    parts: BlockParts | None = None,
) -> HierarchicalMemory | None:
    """Host RAM, or None if it may not be used or holds no block. What outlasts the process is opened by `open_lasting`,
    once nobody else has it.

    Args:
        host: main memory; the hierarchy reserves its part there until it is closed.
        pin: page-locked host RAM, for GPUs.
        parts: where other machines have parts of the blocks; the hierarchy closes them.

    Raises:
        ConfigError: what `open_lasting` could never open: a capacity too small for one segment, or a remote protocol
            that is unknown or not installed.
        OutOfDeviceMemoryError: main memory does not have what is asked for.
    """
    if settings.disk_path is not None and settings.disk_bytes is not None:
        SegmentSizes.of(Tier.L5, settings.disk_bytes, layout.nbytes)
    if settings.remote_url is not None:
        SegmentSizes.of(Tier.L6, settings.remote_bytes, layout.nbytes)
        check_url(settings.remote_url)
    parts = BlockParts(layout.nbytes) if parts is None else parts
    host_bytes = host_share(settings, parts.slot_nbytes, host)
    if parts.slots_in(host_bytes) < 1:
        logger.info("no host memory for KV blocks", bytes=host_bytes, block_bytes=layout.nbytes)
        return None
    options = MemoryOptions(
        host_bytes=host_bytes,
        pin=pin,
        heat=HeatModel(settings.half_life_s),
        write_bytes_s=settings.write_back_bytes_s,
        max_queued_writes=settings.max_queued_writes,
    )
    return HierarchicalMemory(layout, options, host, host_speed=measure_host(), parts=parts)


def host_share(settings: MemorySettings, slot_nbytes: int, host: DeviceBudget) -> int:
    """Bytes of main memory for blocks that take `slot_nbytes` of it each: as set, or a tenth of what is free."""
    if settings.host_bytes is not None:
        return settings.host_bytes
    return _tenth_of(host.free_bytes, "host memory for KV blocks", MOST_AUTOMATIC_SLOTS * slot_nbytes)


def open_lasting(memory: HierarchicalMemory, settings: MemorySettings, salt: bytes) -> None:
    """Add the tiers that outlast the process. One that cannot be opened is left out, with a log line, and is among the
    memory's `troubles`: a directory that another process uses or that cannot be written, a remote place that does not
    answer.

    `salt` is what the KV depends on beside its tokens (model, dtype, revision), as the prefix hashes have it.
    """
    below: list[LowerTier] = []
    missing: dict[Tier, str] = {}
    asked = (Tier.L5, settings.disk_path, _open_disk), (Tier.L6, settings.remote_url, _open_remote)
    try:
        for tier, place, opening in asked:
            if place is None:
                continue
            try:
                below.append(opening(settings, memory.layout, salt))
            except (ConfigError, ConflictError, OSError) as error:  # too little space is known by now alone
                said, missing[tier] = f"{tier.name} is not used", str(error)
                logger.warning(said, place=str(place), reason=missing[tier])
        memory.add_below(below, missing)
    except BaseException:
        for lower in below:
            lower.store.close()
        raise


def _tenth_of(free_bytes: int, what: str, most: int | None = None) -> int:
    tenth = int(free_bytes * AUTOMATIC_SHARE)
    chosen = tenth if most is None else min(tenth, most)
    logger.info(what, size=format_bytes(chosen), reason="a tenth of what is free")
    return chosen


def open_peer(
    settings: MemorySettings, layout: BlockLayout, peer: Peer, speed: TierSpeed,
    kept: dict[bytes, PeerBlock] | None = None,
) -> LowerTier:  # fmt: skip
    """The tier made of other nodes' memory, which is as fast as `measure_peer` has found, with what is `kept` there."""
    compressor = Compressor(layout, settings.peer_codec, settings.kv_quantization, speed)
    return LowerTier(PeerStore(peer, compressor, layout.nbytes, kept), speed)


def _open_disk(settings: MemorySettings, layout: BlockLayout, salt: bytes) -> LowerTier:
    """Raises `ConflictError`, `OSError`, or `ConfigError` if there is too little space."""
    path = settings.disk_path
    assert path is not None
    files = LocalFiles(path)
    try:
        measured = measure_directory(path)
        logger.info(
            "disk measured",
            path=str(path),
            medium=measured.medium,
            read_gb_s=round(measured.speed.read_bytes_s / 1e9, 2),
            write_gb_s=round(measured.speed.write_bytes_s / 1e9, 2),
            random_read_us=round(measured.speed.latency_s * 1e6, 1),
            method=measured.method,
        )
        nbytes = settings.disk_bytes
        if nbytes is None:
            nbytes = _tenth_of(shutil.disk_usage(path).free, "disk space for KV blocks")
        compressor = Compressor(layout, settings.disk_codec, settings.kv_quantization, measured.speed)
        store = SegmentStore(
            Tier.L5, files, nbytes, make_identity(layout, salt, settings), compressor,
            min_free_bytes=settings.disk_min_free_bytes, medium=measured.medium,
        )  # fmt: skip
    except BaseException:
        files.close()
        raise
    return LowerTier(store, measured.speed)


def _open_remote(settings: MemorySettings, layout: BlockLayout, salt: bytes) -> LowerTier:
    """Raises `OSError`."""
    assert settings.remote_url is not None
    files = RemoteFiles(settings.remote_url)
    speed = measure_files(files)
    compressor = Compressor(layout, settings.remote_codec, settings.kv_quantization, speed)
    store = SegmentStore(Tier.L6, files, settings.remote_bytes, make_identity(layout, salt, settings), compressor)
    return LowerTier(store, speed)


def make_identity(layout: BlockLayout, salt: bytes, settings: MemorySettings) -> Identity:
    """What segments must agree in; the salt itself may hold a secret and is only ever stored hashed."""
    hashed = hashlib.blake2b(salt, digest_size=16).hexdigest()
    return Identity(hashed, layout.digest(), layout.nbytes, settings.kv_quantization)
