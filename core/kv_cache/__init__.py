"""Paged KV cache: which block holds which tokens (bookkeeping, no torch) and the tensors behind the blocks."""
