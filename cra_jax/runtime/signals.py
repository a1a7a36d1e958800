"""SIGTERM, SIGHUP and Ctrl-C: the first saves first, the second ends at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(SystemExit):
    """Exits with 128 plus the signal number, as in shells.

    130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP (a closed terminal).
    """

    def __init__(self, number: int):
        super().__init__(128 + number)


class StopRequest:
    """Whether a signal has requested a stop.

    Attributes:
      number: of the signal; 0 before the first one.
    """

    number = 0

    def __bool__(self) -> bool:
        return self.number != 0


@contextmanager
def stop_on_signal(then: str) -> Iterator[StopRequest]:
    """Inside, the first signal is recorded, and the second ends the process.

    SIGHUP never counts as the second one, because a closed terminal often sends it
    twice, and service managers send it with SIGTERM. A signal that was ignored before,
    as by `nohup` and by shells for background jobs, stays ignored.
    Enter it after `jax.distributed.initialize`, which sets its own SIGTERM handler.
    Outside the main thread, where Python handles no signals, it has no effect.

    Args:
      then: what happens after the first signal, for the log line.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            if request:
                return
        else:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_DFL)
        request.number = request.number or number
        # Not print, which the signal may have interrupted.
        line = (
            f"{signal.Signals(number).name}: {then}; a second signal ends it at once\n"
        )
        with contextlib.suppress(OSError):  # a closed terminal or pipe
            os.write(2, b"\n" * os.isatty(2) + line.encode())

    before = {
        number: signal.signal(number, handle)
        for number in _SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end the block, with cleanup, one line, no traceback.

    Raises:
      Stopped: after any of them.
    """

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    is_main = threading.current_thread() is threading.main_thread()
    before = {
        number: signal.signal(number, stop)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if is_main and signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        raise Stopped(signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
