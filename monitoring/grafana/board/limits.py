"""Where panels draw the limits of alerts. The tests compare them with the alert rules."""

GPU_MEMORY_HIGH = 0.90
GPU_MEMORY_CRITICAL = 0.97
ERROR_SHARE = 0.05
LATENCY_P95_S = 10
LATENCY_P99_S = 30
TASKS_RUNNING = 16
API_LATENCY_S = 5
FASTPATH_LATENCY_S = 0.1
BANDWIDTH_GBPS = 1
JOURNAL_BYTES = 100 * 1024 * 1024
EVICTIONS_PER_S = 10

ALERT_LIMITS = {
    "GPUMemoryHigh": GPU_MEMORY_HIGH,
    "GPUMemoryCritical": GPU_MEMORY_CRITICAL,
    "HighInferenceErrorRate": ERROR_SHARE,
    "HighInferenceLatency": LATENCY_P95_S,
    "InferenceLatencyCritical": LATENCY_P99_S,
    "TaskQueueBacklog": TASKS_RUNNING,
    "APILatencyHigh": API_LATENCY_S,
    "FastPathLatencyHigh": FASTPATH_LATENCY_S,
    "GPUTransferBandwidthLow": BANDWIDTH_GBPS,
    "HAJournalLarge": JOURNAL_BYTES,
    "HighMemoryEvictions": EVICTIONS_PER_S,
}
