"""SIGTERM, SIGINT and SIGHUP as a question that the loop asks between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether one of the signals has come.

    The first one only sets that; a second SIGTERM or SIGINT has its default effect and ends the process at once, a
    SIGHUP none, as a shell that is closed sends two. A signal that was ignored stays ignored. What was there before is
    back in place afterwards. Outside the main thread, where signals cannot be caught, nothing is.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    caught = [one for one in _SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]

    def on_signal(number: int, _: Any) -> None:
        received.append(number)
        for one in caught:
            signal.signal(one, signal.SIG_IGN if one == signal.SIGHUP else signal.SIG_DFL)
        # Not print: the signal may have interrupted one.
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            os.write(2, f"\n{name}: finishing the step and saving; a second SIGTERM or Ctrl-C ends at once\n".encode())

    before = {one: signal.signal(one, on_signal) for one in caught}
    try:
        yield lambda: bool(received)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
