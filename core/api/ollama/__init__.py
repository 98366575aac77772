"""Ollama's API, on the path of chat completions; its `/api/generate` is answered by `core.api.native`."""
