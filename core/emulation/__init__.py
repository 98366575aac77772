"""Emulated devices: real computing, paced by a roofline."""
