"""VRAMancer's command line. `python -m vramancer.main --api` starts the server."""

__version__ = "0.1.0"
