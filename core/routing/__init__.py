"""Which replica of a model serves a request, and in which order requests are resumed after a loss. Pure."""
