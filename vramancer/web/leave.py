"""The end of the process."""

from __future__ import annotations

import os
import sys
import threading
import time


def leave(status: int, grace_s: float = 2.0) -> int:
    """`status`, for the program to return; ends the process here if threads are stuck after `grace_s`: one that waits
    for something that never comes would keep the interpreter from ending.
    """
    deadline_s = time.monotonic() + grace_s
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline_s - time.monotonic()))
            if thread.is_alive():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
    return status
