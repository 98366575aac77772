"""Emulated devices: real computing, paced by a roofline."""

from core.emulation.stage import EmulatedStage, GuestTime

__all__ = ["EmulatedStage", "GuestTime"]
