"""Every metric that rules, panels and documents may name. The one list of them, without the prefix `vramancer_`."""

from __future__ import annotations

COUNTERS = (
    "infer_total", "infer_errors_total", "requests_finished_total", "requests_aborted_total", "prompt_tokens_total",
    "generation_tokens_total", "preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
    "kv_cache_evictions_total", "gpu_transfer_ops_total", "transfer_bytes_total", "transfer_seconds_total",
    "memory_promotions_total", "memory_demotions_total", "memory_evictions_total", "memory_dropped_writes_total",
    "memory_tier_hits_total", "memory_tier_misses_total", "lending_borrows_total", "lending_reclaims_total",
    "lending_bytes_lent_total", "stage_busy_seconds_total", "stage_predicted_seconds_total", "stage_forwards_total",
    "tasks_submitted_total", "tasks_completed_total", "tasks_refused_total", "tasks_failed_total",
    "env_endpoint_hits_total", "fastpath_bytes_total", "vtp_tensors_sent_total", "vtp_tensors_recv_total",
    "vtp_bytes_sent_total", "vtp_kv_cache_ops_total", "vtp_attention_queries_total", "telemetry_packets_total",
    "upstream_requests_total", "upstream_failovers_total",
    "orch_placements_total", "orch_migrations_total", "orch_rebalance_total", "orch_hierarchy_moves_total",
    "process_cpu_seconds_total",
    "embedding_inputs_total", "embedding_tokens_total", "embedding_padding_tokens_total", "embedding_batches_total",
    "embedding_failed_batches_total", "embedding_busy_seconds_total",
)  # fmt: skip
GAUGES = (
    "gpu_memory_used_bytes", "gpu_memory_total_bytes", "gpu_utilization_ratio", "gpu_temperature_celsius",
    "gpu_power_watts", "gpu_power_limit_watts", "gpu_pcie_generation", "gpu_pcie_width", "gpu_throttled",
    "gpu_other_memory_bytes",
    "gpu_transfer_bandwidth_gbps", "device_info", "model_info", "batcher_batch_size", "batcher_queue_depth",
    "batcher_throughput_tok_s", "throughput_predicted_tok_s", "requests_running", "requests_waiting",
    "paged_kv_used_pages", "paged_kv_free_pages", "paged_kv_borrowed_pages", "kv_cache_usage_ratio",
    "stage_busy_ratio", "memory_tier_blocks", "memory_tier_used_bytes", "memory_tier_capacity_bytes",
    "lending_active_leases", "lending_pool_capacity_gb", "tasks_running", "tasks_resource_running",
    "task_duration_percentile", "circuit_breaker_open", "process_resident_memory_bytes", "process_virtual_memory_bytes",
    "upstream_requests_running", "upstream_up", "upstream_breaker_open", "embedding_queue_depth",
    "fastpath_interface_latency_seconds", "process_start_time_seconds", "process_open_fds", "process_max_fds",
)  # fmt: skip
HISTOGRAMS = (
    "infer_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds", "request_queue_seconds",
    "request_prefill_seconds", "request_decode_seconds", "request_prompt_tokens", "request_generation_tokens",
    "api_latency_seconds", "task_duration_seconds", "fastpath_latency_seconds",
)  # fmt: skip
GAUGE_HISTOGRAMS = ("block_hotness",)

COMING_COUNTERS = ("vtp_gpudirect_ops_total", "ha_journal_rotations_total")
COMING_GAUGES = ("ha_journal_size_bytes",)
"""What belongs to features that are not there yet: no server shows these."""

VLLM = (
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc",
    "vllm:num_preemptions_total", "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
    "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds", "vllm:request_prompt_tokens", "vllm:request_generation_tokens",
)  # fmt: skip

FAMILIES = (*COUNTERS, *GAUGES, *HISTOGRAMS, *GAUGE_HISTOGRAMS)
COMING = (*COMING_COUNTERS, *COMING_GAUGES)


def samples() -> set[str]:
    """Every name that a query may have, with its prefix: of a histogram those of its parts."""
    found = {*COUNTERS, *GAUGES, *COMING_COUNTERS, *COMING_GAUGES}
    found |= {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "count", "sum")}
    found |= {f"{name}_{part}" for name in GAUGE_HISTOGRAMS for part in ("bucket", "gcount", "gsum")}
    return {f"vramancer_{name}" for name in found}
