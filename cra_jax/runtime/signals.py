"""SIGTERM and Ctrl-C: asked once, work ends at its next good moment; twice, at once."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_HEARD = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """Ends the program with 128 plus the signal's number, as shells have it.

    130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)


class Asked:
    """Whether somebody has asked to stop.

    Attributes:
      number: of the signal; 0 until there is one.
    """

    number = 0

    def __bool__(self) -> bool:
        return self.number != 0


@contextmanager
def heard(then: str) -> Iterator[Asked]:
    """While this holds, the first SIGINT or SIGTERM is noted, and the second ends all.

    One that is ignored from the start, as shells have it for jobs in the background,
    stays so. Enter it after `jax.distributed.initialize`, which takes SIGTERM for
    itself. Outside the main thread, where Python hears none, it does nothing.

    Args:
      then: what will be done about it, in words, for the line that says so.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def hear(number: int, frame: object) -> None:
        for each in _HEARD:
            signal.signal(each, signal.SIG_DFL)
        asked.number = number
        # Not by print, which may be what the signal has interrupted.
        line = f"{signal.Signals(number).name}: {then}; once more ends it at once\n"
        os.write(2, b"\n" * os.isatty(2) + line.encode())

    before = {
        number: signal.signal(number, hear)
        for number in _HEARD
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what is under way, tidied up, by a line and no traceback.

    Raises:
      Stopped: after either signal.
    """

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        raise Stopped(signal.SIGINT) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
