"""Moves tensors between devices and measures it."""

from core.transfer.manager import TransferManager, TransferMethod, TransferStats

__all__ = ["TransferManager", "TransferMethod", "TransferStats"]
