"""Signals at the right moment: not while something that must be done whole is half done.

A comfort, not the guarantee: that lies in the order of the steps, since a signal may end a process at any of them.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_DEFERRED = ("SIGINT", "SIGTERM", "SIGHUP")


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Hold signals that end a process back until the block is done, then let them through.

    Only those with a handler in Python are held, which is where an exception may come from. Only the main thread gets signals;
    elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    numbers = [getattr(signal, name) for name in _DEFERRED if hasattr(signal, name)]
    before = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: pending.append((number, frame)))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in pending:
            before[signal.Signals(number)](number, frame)
