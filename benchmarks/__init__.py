"""Benchmarks of VRAMancer against the engines its users could pick instead.

Start with ``python -m benchmarks.run --help``; ``benchmarks/README.md`` says what is measured and how.
"""
