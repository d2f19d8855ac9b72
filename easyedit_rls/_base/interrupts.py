"""Signals at the right moment: not while something that must be done whole is half done.

A comfort, not the guarantee: that lies in the order of the steps, since a signal may end a process at any of
them.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any

_DEFERRED = ("SIGTERM", "SIGHUP", "SIGINT")  # the last is let through last


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Hold signals that end a process back until the block is done, then let them through, each of them.

    Only those with a handler in Python are held, which is where an exception may come from. Only the main
    thread gets signals; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in _DEFERRED if hasattr(signal, name)]
    with ExitStack() as stack:  # whatever one handler raises, the others come too
        for number in reversed(numbers):
            handler = signal.getsignal(number)
            if callable(handler):
                held: list[FrameType | None] = []
                stack.callback(_let_through, number, handler, held)
                signal.signal(number, partial(_hold, held))
        yield


def _hold(held: list[FrameType | None], number: int, frame: FrameType | None) -> None:
    held.append(frame)


def _let_through(
    number: int, handler: Callable[[int, FrameType | None], Any], held: list[FrameType | None]
) -> None:
    signal.signal(number, handler)
    if held:
        handler(number, held[0])
