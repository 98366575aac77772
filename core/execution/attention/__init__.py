"""Attention over paged KV: what a step's batch looks like, and the ways to compute it."""
