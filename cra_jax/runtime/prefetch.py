"""Computes results ahead of their use, in threads, and yields them in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(
    make: Callable[[int], T],
    start: int,
    stop: int,
    *,
    workers: int = 2,
    depth: int = 4,
) -> Generator[T, None, None]:
    """Yields `make(start), ..., make(stop - 1)` in order, computed ahead in threads.

    Closing the generator cancels calls that have not begun, and waits for the others.
    An error of `make` is raised in order, after all results before it.

    Args:
      make: called from several threads; must depend only on its argument.
      start: first argument.
      stop: one past the last argument.
      workers: number of threads.
      depth: maximum number of results being computed or waiting.

    Raises:
      ValueError: `workers` or `depth` is below 1.
    """
    if workers < 1 or depth < 1:
        raise ValueError(
            f"workers is {workers} and depth is {depth}: set both to 1 or more"
        )
    return _prefetch(make, iter(range(start, stop)), workers, depth)


def _prefetch(
    make: Callable[[int], T], numbers: Iterator[int], workers: int, depth: int
) -> Generator[T, None, None]:
    """The generator of `prefetch`; separate so that the call checks its arguments."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    ahead: deque[Future[T]] = deque()
    try:
        while True:
            while len(ahead) < depth and (number := next(numbers, None)) is not None:
                ahead.append(pool.submit(make, number))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
