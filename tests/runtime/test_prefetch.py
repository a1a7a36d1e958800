"""Results in order from threads, errors at their place, and no thread left over."""

import itertools
import threading
import time

import pytest

from cra_jax.runtime.prefetch import prefetch


def prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetch_ends_its_threads_when_closed():
    started = []

    def make(i):
        started.append(i)
        time.sleep(0.02)
        return i

    ahead = prefetch(make, 0, 10_000, workers=3, depth=6)
    assert [next(ahead), next(ahead)] == [0, 1]
    assert len(prefetch_threads()) == 3
    ahead.close()
    assert prefetch_threads() == []
    assert len(started) <= 2 + 6 + 1


def test_prefetch_begins_nothing_more_once_closed():
    started = []

    def make(i):
        started.append(i)
        time.sleep(0.02)
        return i

    ahead = prefetch(make, 0, 10_000, workers=1, depth=50)
    next(ahead)
    ahead.close()
    assert len(started) < 50  # all 50 were asked for


def test_prefetch_ends_its_threads_at_the_end():
    assert list(prefetch(lambda i: i * i, 2, 40, workers=4, depth=3)) == [
        i * i for i in range(2, 40)
    ]
    assert list(prefetch(lambda i: i, 5, 5)) == []
    assert prefetch_threads() == []


def test_prefetch_stays_in_order_when_later_work_is_done_first():
    def make(i):
        time.sleep(0.03 if i % 4 == 0 else 0)
        return i

    assert list(prefetch(make, 0, 16, workers=4, depth=8)) == list(range(16))


def test_prefetch_raises_an_error_at_its_place():
    def make(i):
        if i == 5:
            raise RuntimeError("at five")
        return i

    ahead = prefetch(make, 0, 100, workers=4, depth=8)
    assert list(itertools.islice(ahead, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="at five"):
        next(ahead)
    assert prefetch_threads() == []


def test_prefetch_works_ahead_but_not_beyond_its_depth():
    started = []
    ahead = prefetch(lambda i: started.append(i), 0, 100, workers=2, depth=5)
    next(ahead)
    deadline = time.monotonic() + 5
    while len(started) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(started) == [0, 1, 2, 3, 4]
    ahead.close()


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"depth": 0}])
def test_prefetch_refuses_no_workers_at_the_call(arguments):
    with pytest.raises(ValueError, match="set both to 1 or more"):
        prefetch(lambda i: i, 0, 3, **arguments)
