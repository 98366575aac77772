"""What msgspec raises for bytes that are not what they should be."""

from __future__ import annotations

import msgspec

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Text that is no UTF-8, and what is nested too deeply, have errors of their own."""
