"""Continuous batching: the engine thread, its scheduler, and what turns tokens into text. No torch here."""
