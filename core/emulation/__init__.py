"""Emulated devices: real computing, paced by a roofline."""

from core.emulation.guest_time import GuestTime
from core.emulation.stage import EmulatedStage

__all__ = ["EmulatedStage", "GuestTime"]
