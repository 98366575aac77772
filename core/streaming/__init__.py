"""Weights that do not fit on the devices: they stay in main memory and stream in."""
