"""Memory and use of the cards, and what goes between them."""

from __future__ import annotations

from monitoring.grafana.board import limits
from monitoring.grafana.board.panels import BAD, NOTABLE, Section, lines, periods
from monitoring.grafana.board.queries import CARD, Query, gauge, rate

_CARD = "{{gpu}} {{instance}}"

_MEMORY = (
    lines(
        "Memory of each device",
        "Bytes in use; each device's total is dashed. Of a card that is used as a whole, everybody's use counts; of a "
        "part of a card or of a processor, what VRAMancer may use. KV pages that no request uses do not count.",
        Query(gauge("gpu_memory_used_bytes", CARD), _CARD),
        Query(gauge("gpu_memory_total_bytes", CARD), f"total {_CARD}"),
        unit="bytes",
        width=12,
        height=9,
        dashed="^total",
        leads_to="How full each device is",
    ),
    lines(
        "Use of each device",
        "Share of the time in which the card computes, by its driver. A stage that waits for others shows here as "
        "little use.",
        Query(gauge("gpu_utilization_ratio", CARD), _CARD),
        unit="percentunit",
        width=12,
        height=9,
        top=1,
        leads_to="Busy share of each stage",
    ),
)

_TRANSFERS = (
    lines(
        "Transfer operations",
        "Tensors sent between devices per second.",
        Query(rate("gpu_transfer_ops_total", "method", "src", "dst"), "{{src}} to {{dst}}, {{method}} {{instance}}"),
        unit="ops",
    ),
    lines(
        "Transfer bandwidth",
        "Gigabits per second over the last transfers of each method. Small tensors never reach a link's speed; the "
        "alert begins below 1 Gbit/s, when they are 64 KiB in the mean.",
        Query(gauge("gpu_transfer_bandwidth_gbps"), "{{method}} {{instance}}"),
        unit="Gbits",
        limits=((limits.BANDWIDTH_GBPS, NOTABLE),),
    ),
    lines(
        "Bytes between devices",
        "Bytes sent per second.",
        Query(rate("transfer_bytes_total", "method", "src", "dst"), "{{src}} to {{dst}}, {{method}} {{instance}}"),
        unit="Bps",
    ),
    lines(
        "Time spent sending",
        "Share of the time in which something is on the way from one device to another. Near 100 %, the link is what "
        "requests wait for.",
        Query(rate("transfer_seconds_total", "method", "src", "dst"), "{{src}} to {{dst}}, {{method}} {{instance}}"),
        unit="percentunit",
    ),
    lines(
        "Tasks per resource",
        "Background tasks that run, by what they use.",
        Query(gauge("tasks_resource_running"), "{{resource}} {{instance}}"),
        unit="none",
        stacked=True,
    ),
    lines(
        "Memory of other programs",
        "Bytes of each card that other processes hold: a desktop, a game, another model.",
        Query(gauge("gpu_other_memory_bytes", CARD), _CARD),
        unit="bytes",
    ),
)

_HARDWARE = (
    lines(
        "Temperature",
        "Of each card. Most slow down from 83 to 90 °C on.",
        Query(gauge("gpu_temperature_celsius", CARD), _CARD),
        unit="celsius",
        width=6,
        limits=((83, NOTABLE), (90, BAD)),
    ),
    lines(
        "Power",
        "What each card draws.",
        Query(gauge("gpu_power_watts", CARD), _CARD),
        unit="watt",
        width=6,
    ),
    periods(
        "Slowed down",
        "When a card's driver lowered its clocks, and why.",
        Query(f"{gauge('gpu_throttled', CARD)} > 0", f"{{{{reason}}}} {_CARD}"),
        steps=((None, NOTABLE),),
        width=6,
    ),
    lines(
        "PCI Express link",
        "Generation and lanes that each card's link runs at now. Cards lower the generation when idle; fewer lanes "
        "than the slot has are a riser or a slot.",
        Query(gauge("gpu_pcie_generation", CARD), f"generation {_CARD}"),
        Query(gauge("gpu_pcie_width", CARD), f"lanes {_CARD}"),
        unit="none",
        width=6,
        colors={"^generation": "purple", "^lanes": "blue"},
    ),
)

SECTION = Section("GPU memory and utilisation", (*_MEMORY, *_TRANSFERS, *_HARDWARE))
