"""The stages of the pipeline: who works, who waits, and whether it goes as predicted."""

from __future__ import annotations

from monitoring.grafana.board.panels import Section, lines
from monitoring.grafana.board.queries import Query, gauge, rate

_STAGE = "{{stage}} {{instance}}"

SECTION = Section(
    "Stages",
    (
        lines(
            "Busy share of each stage",
            "Share of the time that each stage computes. With enough requests all are near 100 %; one that is much "
            "lower than the others waits for them, and the placement could be better.",
            Query(rate("stage_busy_seconds_total", "stage"), _STAGE),
            unit="percentunit",
            top=1,
        ),
        lines(
            "Predicted and measured throughput",
            "Tokens per second: what the placement was predicted to reach, dashed, and what the batcher reaches.",
            Query(gauge("batcher_throughput_tok_s"), "measured {{instance}}"),
            Query(gauge("throughput_predicted_tok_s"), "predicted {{instance}}"),
            unit="suffix: tok/s",
            dashed="^predicted",
            colors={"^measured": "blue", "^predicted": "text"},
        ),
        lines(
            "Measured time by predicted time",
            "Seconds that each stage computed for each second predicted. 1 is as predicted; more is slower: heat, "
            "another program, a slower link than was measured.",
            Query(
                f"{rate('stage_busy_seconds_total', 'stage')} / ({rate('stage_predicted_seconds_total', 'stage')} > 0)",
                _STAGE,
            ),
            unit="none",
            limits=((1.25, "orange"),),
        ),
        lines(
            "Forward passes",
            "Of each stage, per second.",
            Query(rate("stage_forwards_total", "stage"), _STAGE),
            unit="ops",
            width=12,
        ),
        lines(
            "Busy share since the model was loaded",
            "The mean share of the time that each stage has computed.",
            Query(gauge("stage_busy_ratio"), _STAGE),
            unit="percentunit",
            width=12,
            top=1,
        ),
    ),
)
