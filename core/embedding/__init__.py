"""Embedding models and rerankers, served beside the chat model: finding out how they pool, loading, batching."""
