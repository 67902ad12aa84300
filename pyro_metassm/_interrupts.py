"""Ctrl-C while a fit runs: heard at once, obeyed after the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stop:
    """Whether a stop was asked for."""

    requested: bool = False


@contextmanager
def deferred() -> Iterator[Stop]:
    """SIGINT asks for a stop instead of raising ``KeyboardInterrupt``; a second one raises at once.

    The handler is as before from the first SIGINT on, and at the end in any case. Other threads than the main one get
    no signals, and a process that ignores SIGINT goes on ignoring it: there nothing changes.
    """
    stop = Stop()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield stop
        return

    def handler(number, frame) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
