"""Progress of a long job: a bar on a terminal, lines in a log; a clock for steps."""

import sys
import time
from typing import Any

from tqdm import tqdm

LOG_EVERY_S = 10.0


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
            desc=title,
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
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
