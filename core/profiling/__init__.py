"""Measuring devices, layers and links, and keeping what was measured."""
