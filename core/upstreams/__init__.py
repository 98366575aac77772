"""Models that other servers answer for, beside ours: vLLM, Ollama, llama.cpp, another VRAMancer. No torch here.

A name that clients may ask for is a `Group` of replicas. Each `Replica` is one address with a breaker and what is known
of its load. A `Call` is one request there. `Upstreams` holds the groups and looks at the addresses from time to time.
"""
