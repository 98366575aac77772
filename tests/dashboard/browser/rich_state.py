"""What the API of a busy server with three unequal cards answers, as far as the dashboard asks."""

from __future__ import annotations

import time
from typing import Any

GIB = 1 << 30


def _device(name: str, gib: float, weights: float, own: float, lent: float, borrowed: float, other: float) -> Any:
    sizes = {"weights": weights, "own_kv": own, "lent": lent, "borrowed": borrowed, "other": other}
    free = gib - weights - own - lent - other
    limits = {"name": name, "limit_bytes": int(gib * GIB), "free_bytes": int(free * GIB)}
    return limits | {f"{key}_bytes": int(value * GIB) for key, value in sizes.items()}


DEVICES = [
    _device("cuda:0", 24, 12.6, 8.4, 1.2, 0, 0.8),
    _device("cuda:1", 16, 9.4, 5.2, 0, 0, 0.7),
    _device("cuda:2", 8, 5.5, 1.7, 0, 1.2, 0.6),
]
LAYERS = ((0, 18), (19, 31), (32, 39))


def _stage(index: int) -> dict[str, Any]:
    device = DEVICES[index]
    return {
        "index": index, "device": device["name"], "layers": list(LAYERS[index]),
        "weight_bytes": device["weights_bytes"],
        "streamed_layers": [38, 39] if index == 2 else [], "streamed_bytes": GIB if index == 2 else 0,
        "stream_slot_bytes": 0, "stream_wait_seconds": 1.2, "kv_bytes": device["own_kv_bytes"],
        "workspace_bytes": device["other_bytes"], "limit_bytes": device["limit_bytes"], "attention": "triton",
        "forwards": 1000 + index, "seconds_per_forward": 0.0123, "busy_seconds": 0.0, "predicted_seconds": 0.0,
    }  # fmt: skip


def _lease(number: int, lender: str, borrower: str, gib: float) -> dict[str, Any]:
    sizes = {"bytes": int(gib * GIB), "blocks": int(gib * 1280)}
    return {
        "id": number,
        "borrower": borrower,
        "lender": lender,
        **sizes,
        "state": "active",
        "priority": 0,
        "age_seconds": 300.0,
    }


def _tier(name: str, medium: str, gib: float, used: float, blocks: int) -> dict[str, Any]:
    hottest = [
        {"block": f"{number * 7919:032x}", "hotness": round(2.4 * 0.965**number, 4), "pinned": number % 17 == 3}
        for number in range(min(128, blocks))
    ]
    return {
        "tier": name, "medium": medium, "codec": "none" if name == "L3" else "lz4", "blocks": blocks,
        "used_bytes": int(used * GIB), "capacity_bytes": int(gib * GIB), "hits": 820, "misses": 180, "damaged": 0,
        "stopped": None, "mean_hotness": 0.3, "read_bytes_per_second": int(11.4e9 if name == "L3" else 2.9e9),
        "write_bytes_per_second": int(11.2e9 if name == "L3" else 0.9e9),
        "moves": [{"kind": "demotion", "from": "L1", "to": name, "blocks": blocks}], "hottest": hottest,
    }  # fmt: skip


def _request(number: int, state: str, prompt: int, generated: int, age: float) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{number * 104729:032x}-0", "state": state, "prompt_tokens": prompt,
        "generated_tokens": generated, "age_seconds": age,
    }  # fmt: skip


def _task(kind: str, detail: str, status: str, seconds: float, error: str | None = None) -> dict[str, Any]:
    return {
        "id": f"{kind}-{seconds}", "kind": kind, "detail": detail, "priority": "normal", "resource": "devices",
        "status": status, "started_at": time.time() - seconds, "seconds": seconds, "error": error,
    }  # fmt: skip


_LINK = {"latency_s": 0.000142, "bytes_per_second": 1.17e8, "interface": "eth0", "kind": "ethernet", "encrypted": True}


def _node(
    name: str, roles: list[str], link: dict[str, float] | None, devices: list[Any], layers: dict[str, list[int]]
) -> dict[str, Any]:
    return {
        "id": name, "hostname": name, "roles": roles, "status": "leaving" if link else "joined",
        "address": "10.0.0.7", "link": link, "processor": "AMD Ryzen 7 5800X", "system": "Linux x86_64",
        "devices": devices, "layers": layers, "lends_bytes": (8 << 30) * bool(link), "lent_bytes": 3 << 30,
    }  # fmt: skip


def answers() -> dict[str, Any]:
    gpu = [
        {
            "name": device["name"], "index": index, "backend": "cuda", "limit_bytes": device["limit_bytes"],
            "used_bytes": device["limit_bytes"] - device["free_bytes"], "used_by_purpose": {},
            "reading": {
                "utilization": 0.87 - 0.2 * index, "temperature_c": 71 - 3 * index, "power_w": 301.0 - 60 * index,
                "power_limit_w": 350.0, "pcie_generation": 4, "pcie_width": 16 >> index,
                "throttling": ["power"][index:],
                "other_bytes": 0,
            },
        }
        for index, device in enumerate(DEVICES)
    ]  # fmt: skip
    return {
        "/api/pipeline/status": {
            "ready": True, "state": "ready", "subsystems": {},
            "model": {
                "name": "Qwen/Qwen3-14B", "aliases": [], "dtype": "bfloat16", "parameters": 14_768_307_200,
                "max_model_len": 32768, "load_seconds": 41.3,
            },
            "placement": {"strategy": "profiled", "unused_devices": []},
            "kv_cache": {"tokens": 131200, "block_size": 16},
            "memory": {}, "stages": [_stage(index) for index in range(3)],
            "prediction": {
                "context": 2048, "floor_seconds": 0.0306, "tokens_per_second": {"1": 29.8, "8": 171.0, "32": 388.5},
                "now": {"streams": 3, "predicted": 71.4, "measured": 68.9},
            },
            "transfers": [
                {"method": "peer", "src": "cuda:0", "dst": "cuda:1", "ops": 90000, "bytes": 9 * GIB, "seconds": 0.8,
                 "bytes_per_second": int(12.1e9)},
            ],
            "notes": ["cuda:2 keeps 2 layers in main memory"],
        },
        "/api/queue/status": {
            "running": 3, "waiting": 1, "unfinished": 4, "limit": 256,
            "circuit_breaker": {"state": "closed", "failures": 0, "last_error": None}, "unfinished_sequences": 4,
            "prompt_tokens": 35989, "prompt_tokens_limit": 4194304,
            "requests": [
                _request(1, "running", 1840, 611, 75.2), _request(2, "running", 96, 203, 12.9),
                _request(3, "running", 12004, 4, 3.1), _request(4, "waiting", 22051, 0, 0.4),
            ],
        },
        "/api/batcher/stats": {
            "steps": 9000, "failed_steps": 0, "running": 3, "waiting": 1, "batch_size": 3, "batch_tokens": 259,
            "tokens_per_second": 68.9, "generated_tokens": 1284022, "preemptions": 2, "prefix_hit_rate": 0.37,
            "kv_blocks": {"total": 8200, "free": 3100, "cached": 1900}, "max_batch_size": 64,
            "latency": {
                "first_token": {"count": 900, "p50": 0.182, "p95": 0.61, "p99": 1.42},
                "between_tokens": {"count": 90000, "p50": 0.0431, "p95": 0.052, "p99": 0.088},
                "request": {"count": 880, "p50": 6.1, "p95": 22.8, "p99": 41.0},
            },
        },
        "/api/memory": {
            "devices": DEVICES,
            "kv_blocks": {"size_tokens": 16, "total": 8200, "with_memory": 8200, "free": 3100, "cached": 1900},
            "stages": [], "leases": [_lease(1, "cuda:0", "cuda:2", 0.7), _lease(2, "cuda:0", "cuda:2", 0.5)],
            "decisions": {},
            "tiers": [_tier("L3", "pinned", 16, 3.1, 3968), _tier("L5", "nvme", 200, 41, 52480)],
            "tier_troubles": {"L6": "store.lan:6379 does not answer"},
        },
        "/api/gpu": {"devices": gpu},
        "/api/tasks": {
            "running": [_task("place", "Qwen/Qwen3-14B", "running", 4.2)],
            "recent": [
                _task("load", "Qwen/Qwen3-14B", "completed", 41.3),
                _task("load", "owner/other", "failed", 0.9, "'owner/other' is gated: accept its terms on the hub."),
            ],
        },
        "/health": {
            "status": "degraded", "failed": [],
            "checks": {
                "engine": {"status": "ok", "detail": "fine"}, "disk": {"status": "degraded", "detail": "192 MiB free"},
            },
        },
        "/api/system": {
            "hostname": "workshop", "platform": "Linux", "python": "3.12", "read_only": False,
            "cpu": {"count": 16, "physical_count": 8, "utilization_percent": 12.0, "load_average": [1.2, 1.1, 0.9]},
            "memory": {"total_bytes": 64 * GIB, "available_bytes": 40 * GIB, "used_bytes": 24 * GIB,
                       "used_percent": 37.5},
            "disk": {"path": "/home", "total_bytes": 900 * GIB, "free_bytes": GIB // 5, "used_percent": 99.9},
            "process": {"pid": 4242, "resident_bytes": 6 * GIB, "threads": 40, "uptime_s": 93600.0},
        },
        "/api/nodes": {
            "nodes": [
                _node("workshop", ["api", "engine", "master"], None, gpu, {gpu[0]["name"]: [0, 19]}),
                _node("attic", ["worker"], _LINK, [], {}),
            ],
            "left_out": [{"name": "cellar", "address": "10.0.0.9", "reason": "it has VRAMancer 0.0.9, not 0.1.0"}],
            "discovery": {"status": "advertised", "address": "10.0.0.7", "port": 5040},
            "offer": {"tokens_per_second": {"1": 41.5, "16": 310.0}, "now": {"1": 40.0, "16": 204.0}, "devices": None},
        },
        "/api/models": {
            "object": "list", "loaded": "Qwen/Qwen3-14B",
            "data": [
                {"id": "Qwen/Qwen3-14B", "path": "/models/qwen3-14b", "size_bytes": 28 * GIB, "loaded": True},
                {"id": "vramancer-demo", "path": "/models/demo", "size_bytes": 11 << 20, "loaded": False},
            ],
        },
    }  # fmt: skip
