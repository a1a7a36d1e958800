"""Standard output and error, and the progress of a long job; a clock for steps."""

import contextlib
import errno
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

LOG_EVERY_S = 10.0
# C0 and C1 without tab and newline, DEL, line separators, and what reorders a line.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)


def escape_controls(text: str) -> str:
    r"""Replaces control characters by escapes such as `\x1b`.

    Names of files and classes may have some that move the cursor or hide text.
    """
    return _CONTROL.sub(lambda x: x[0].encode("unicode_escape").decode(), text)


class Output:
    """A standard stream on which a write cannot fail, so that no work is lost.

    It escapes control characters, and characters that its encoding lacks. After an
    error it discards what is written.

    Attributes:
      error: the first error; None without one.
      bars: the same stream for progress bars, which move the cursor.
    """

    def __init__(self, stream: Any, *, escape: bool = True):
        self._stream, self._escape = stream, escape
        self.error: OSError | ValueError | None = None
        self.bars: Any = Output(stream, escape=False) if escape else None
        with contextlib.suppress(AttributeError):  # a stream of a test has none
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text; returns its length."""
        self._attempt(
            self._stream.write, escape_controls(text) if self._escape else text
        )
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes several texts."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Writes what is buffered."""
        self._attempt(self._stream.flush)

    @property
    def is_closed_by_reader(self) -> bool:
        """Whether the reader of a pipe, such as `head`, or the terminal has gone."""
        closed = (errno.EPIPE, errno.EIO)
        return isinstance(self.error, OSError) and self.error.errno in closed

    def _attempt(self, function: Any, *arguments: str) -> None:
        try:
            function(*arguments)
        except (OSError, ValueError) as error:
            self.error = self.error or error
            # Also for what is still buffered, and for libraries that are not Python.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def protected_output() -> Iterator[None]:
    """Makes standard output and error an `Output`, also if they are closed.

    Raises:
      SystemExit: standard output could not be written, for another reason than a
        reader that has gone.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened gets this number
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    output = Output(sys.stdout or open(os.devnull, "w"))  # noqa: SIM115
    errors: Any = Output(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115
    sys.stdout, sys.stderr = output, errors  # pyright: ignore[reportAttributeAccessIssue]
    status: Any = None
    try:
        yield
    except SystemExit as end:
        status = end.code
        raise
    finally:
        output.flush()
        errors.flush()
        if output.error and not output.is_closed_by_reader and not status:
            sys.exit(f"error: standard output cannot be written ({output.error})")


def bar_file() -> Any:
    """Standard error, for a progress bar."""
    return getattr(sys.stderr, "bars", sys.stderr)


@contextlib.contextmanager
def above_bars() -> Iterator[None]:
    """Lines that are printed inside stand above the progress bars."""
    with tqdm.external_write_mode(file=bar_file()):
        yield


class Progress:
    """Counts finished work, and shows it with the remaining time.

    Used in a `with` block, from one thread.

    Args:
      total: amount of work.
      title: name of the job.
      unit: of `total`; "B" is shown as kB, MB, GB.
      done: amount of work finished earlier.
      show: False prints nothing.
    """

    def __init__(
        self, total: int, title: str, *, unit: str, done: int = 0, show: bool = True
    ):
        self._total, self._title, self._unit = total, title, unit
        self._done = self._first = done
        self._begun = self._last_line = time.monotonic()
        is_terminal = sys.stderr.isatty()
        self._logs = show and not is_terminal
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=escape_controls(title),
            file=bar_file(),
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            dynamic_ncols=True,
            disable=not (show and is_terminal),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Adds `count` to the finished work."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if not self._logs or (
            now - self._last_line < LOG_EVERY_S and self._done < self._total
        ):
            return
        self._last_line = now
        rate = (self._done - self._first) / max(now - self._begun, 1e-9)
        left_s = (self._total - self._done) / max(rate, 1e-9)
        done, total, pace = map(self._figure, (self._done, self._total, rate))
        unit = "MB" if self._unit == "B" else self._unit
        print_line(
            f"{self._title}: {done} of {total} {unit}, {pace} {unit}/s,"
            f" {left_s:.0f} s left"
        )

    def back_to(self, done: int) -> None:
        """Sets the finished work to `done` after a loss."""
        self._done = self._first = done
        self._begun = time.monotonic()
        self._bar.reset()
        self._bar.update(done)

    def _figure(self, count: float) -> str:
        if self._unit == "B":
            return f"{count / 1e6:,.1f}"
        return f"{count:,.0f}"


class Clock:
    """Times steps; time before `restart` does not count."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts measuring now."""
        self._last = time.monotonic()

    def seconds_a_step(self, count: int) -> float:
        """Mean seconds over `count` steps since the last call or `restart`."""
        now = time.monotonic()
        seconds, self._last = (now - self._last) / max(count, 1), now
        return max(seconds, 1e-9)


def print_line(text: str) -> None:
    """Prints a line on standard error, above the progress bar if there is one."""
    with above_bars():
        print(escape_controls(text), file=sys.stderr, flush=True)
