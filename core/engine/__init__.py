"""One loaded model: its plan, memory, stages and batcher, and how requests get to it."""
