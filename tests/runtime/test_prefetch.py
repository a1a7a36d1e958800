"""Prefetch: the order of results, errors, depth and the end of its threads."""

import itertools
import threading
import time

import pytest

from cra_jax.runtime.prefetch import prefetch


def prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_close_ends_the_threads():
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


def test_close_starts_no_further_work():
    started = []

    def make(i):
        started.append(i)
        time.sleep(0.02)
        return i

    ahead = prefetch(make, 0, 10_000, workers=1, depth=50)
    next(ahead)
    ahead.close()
    assert len(started) < 50  # the depth is 50


def test_threads_end_after_the_last_result():
    assert list(prefetch(lambda i: i * i, 2, 40, workers=4, depth=3)) == [
        i * i for i in range(2, 40)
    ]
    assert list(prefetch(lambda i: i, 5, 5)) == []
    assert prefetch_threads() == []


def test_results_are_in_order_if_later_work_ends_first():
    def make(i):
        time.sleep(0.03 if i % 4 == 0 else 0)
        return i

    assert list(prefetch(make, 0, 16, workers=4, depth=8)) == list(range(16))


def test_error_is_raised_in_the_order_of_results():
    def make(i):
        if i == 5:
            raise RuntimeError("at five")
        return i

    ahead = prefetch(make, 0, 100, workers=4, depth=8)
    assert list(itertools.islice(ahead, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="at five"):
        next(ahead)
    assert prefetch_threads() == []


def test_prefetch_works_ahead_up_to_its_depth():
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
def test_workers_or_depth_of_zero_are_an_error_at_the_call(arguments):
    with pytest.raises(ValueError, match="set both to 1 or more"):
        prefetch(lambda i: i, 0, 3, **arguments)
