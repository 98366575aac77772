"""Embeddings, reranking and scores: OpenAI's route, and those of Jina, Cohere, vLLM and llama.cpp."""
