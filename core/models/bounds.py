"""The most that any model could have of what its config counts, where nothing else says. No torch: plans for cards ask
this too."""

from __future__ import annotations

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

LIMITS = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "moe_intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
    "num_experts_per_tok": 1 << 14,
    "num_nextn_predict_layers": 64,
    **dict.fromkeys(EXPERTS, 1 << 14),
    **dict.fromkeys(LATENT, 1 << 16),
}
HUGE = 1e30
MOST_EXPERTS = 1 << 17
"""Of all layers together."""
