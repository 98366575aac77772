"""What the board shows, from what an operator looks at first to what is rarely needed."""

from monitoring.grafana.board.panels import Section
from monitoring.grafana.board.sections import (
    api,
    cards,
    glance,
    inference,
    kv_cache,
    lending,
    network,
    orchestrator,
    stages,
    tiers,
    tokens,
)

SECTIONS: tuple[Section, ...] = (
    glance.SECTION,
    inference.SECTION,
    tokens.SECTION,
    cards.SECTION,
    stages.SECTION,
    kv_cache.SECTION,
    lending.SECTION,
    tiers.SECTION,
    api.SECTION,
    orchestrator.SECTION,
    network.SECTION,
)
