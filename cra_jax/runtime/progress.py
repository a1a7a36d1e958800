"""Progress of a long job: a bar on a terminal, lines in a log; a clock for steps."""

import sys
import time
from typing import Any

from tqdm import tqdm

LOG_EVERY_S = 10.0


class Progress:
    """Counts work that is done, and shows it with the time that is left.

    Used in a `with` block, from one thread.

    Args:
        total: how much there is to do.
        title: what the job is called.
        unit: of `total`; "B" is shown as kB, MB, GB.
        done: what had been done before.
        show: False keeps silent.
    """

    def __init__(
        self, total: int, title: str, *, unit: str, done: int = 0, show: bool = True
    ):
        self._total, self._title, self._unit = total, title, unit
        self._done = self._first = done
        self._begun = self._said = time.monotonic()
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
        """So much more is done."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if not self._logs or (
            now - self._said < LOG_EVERY_S and self._done < self._total
        ):
            return
        self._said = now
        rate = (self._done - self._first) / max(now - self._begun, 1e-9)
        left_s = (self._total - self._done) / max(rate, 1e-9)
        done, total, pace = map(self._figure, (self._done, self._total, rate))
        unit = "MB" if self._unit == "B" else self._unit
        say(
            f"{self._title}: {done} of {total} {unit}, {pace} {unit}/s,"
            f" {left_s:.0f} s left"
        )

    def back_to(self, done: int) -> None:
        """What was done is lost: counting goes on from `done`."""
        self._done = self._first = done
        self._begun = time.monotonic()
        self._bar.reset()
        self._bar.update(done)

    def _figure(self, count: float) -> str:
        if self._unit == "B":
            return f"{count / 1e6:,.1f}"
        return f"{count:,.0f}"


class Clock:
    """Times steps; what happens before `restart` does not count."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """From here on."""
        self._last = time.monotonic()

    def seconds_a_step(self, count: int) -> float:
        """Mean over `count` steps since this was last asked or restarted."""
        now = time.monotonic()
        seconds, self._last = (now - self._last) / max(count, 1), now
        return max(seconds, 1e-9)


def say(text: str) -> None:
    """A line for people, on standard error; above the bar where there is one."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
