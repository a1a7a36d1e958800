"""Two real processes train as one, and what one of them gets wrong both say."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import host_of_two
import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from cra_jax import evaluate, hosts, parallel, run_folder, train
from cra_jax.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")

TESTS = Path(__file__).resolve().parent


def _begin(what, folder):
    """Starts two hosts; returns their processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "JAX_COMPILATION_CACHE_DIR": str(
            jax.config.values["jax_compilation_cache_dir"]
        ),
    }
    return [
        subprocess.Popen(
            [
                sys.executable,
                TESTS / "host_of_two.py",
                what,
                str(index),
                str(port),
                folder,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]


def _start(what, folder):
    """Of each of two hosts what its calls said, and all that it printed."""
    started = _begin(what, folder)
    said = []
    try:
        for process in started:
            out, err = process.communicate(timeout=900)
            assert process.returncode == 0, err[-3000:]
            lines = [json.loads(x) for x in out.splitlines() if x.startswith("{")]
            said.append(({k: v for x in lines for k, v in x.items()}, out, err))
    finally:
        for process in started:
            process.kill()
    return said


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    return _start("talk", tmp_path_factory.mktemp("talk"))


def test_what_the_first_host_has_all_have(talk):
    for index, (said, *_) in enumerate(talk):
        assert said["shard"] == [index, 2]
        assert said["told"] == {"text": "é 0"}
        assert said["arrays"] == [0, 1, 2]
        assert said["sum"] == [1, 3, 5]
        assert said["devices"] == "4 x cpu on 2 hosts"


def test_what_is_wrong_on_one_host_is_said_on_both(talk):
    for said, *_ in talk:
        assert said["same"] is None
        expected = "ValueError: the hosts differ in looks:\n  host 0: like \n  host 1: "
        assert said["different"] == expected + "like me"
        assert said["fails"] == "ValueError: host 1: no such folder: mine"


def test_a_step_is_of_all_rows_and_a_pass_of_all_pictures(talk):
    for said, *_ in talk:
        assert said["steps"] == [[22.5, 22.5], 7.5]
        logits, labels, share = said["scores"]
        assert labels == list(range(13))
        assert logits == [[i / 2, i / 2] for i in range(13)]
        assert share == 4  # of 8: 5, rounded up to four devices


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of a training of two hosts, and what `_start` returns."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, _start("train", folder)


@pytest.mark.slow
def test_two_hosts_give_the_numbers_of_one(pair, tmp_path):
    """Four devices of two hosts, against the eight of this one."""
    folder, _ = pair
    assert parallel.device_count() == 8
    train.run(host_of_two.config(folder), tmp_path)
    two_epochs = host_of_two.config(folder, **{"train.epochs": 2})
    scores = train.run(two_epochs, tmp_path, allow_change=True)
    evaluate.run(two_epochs, tmp_path)
    expected = run_folder.read_metrics(tmp_path)
    found = run_folder.read_metrics(folder / "run")
    assert len(found) == len(expected) == 4 + 2 * 2 + 2
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            # A spread is within a device's share, and time is what it is.
            if not re.search("_std$|_second$|_seconds$", name):
                if not isinstance(value, str):
                    value = pytest.approx(value, rel=2e-3, abs=2e-4)
                assert line[name] == value, name
    for split in scores:
        rows = [
            run_folder.read_results(run, split, "full")
            for run in (folder / "run", tmp_path)
        ]
        assert [x.predicted for x in rows[0]] == [x.predicted for x in rows[1]]


@pytest.mark.slow
def test_the_first_host_writes_and_speaks_and_all_know_the_scores(pair):
    folder, ((first, out, err), (second, other_out, other_err)) = pair
    assert first["train"] == second["train"]
    assert first["resume"] == second["resume"]
    assert first["resume"]["test"]["step"] == 4
    assert not (folder / "nowhere").exists()
    assert "test, full: top-1" in out
    assert "4 x cpu on 2 hosts" in err
    assert "goes on from step 2" in err
    assert "top-1" not in other_out + other_err
    saved = json.loads((folder / "run" / "config.json").read_text())
    assert "hosts" not in saved  # other hosts may go on with it
    starts = json.loads((folder / "run" / "provenance.json").read_text())["starts"]
    assert [x["outcome"] for x in starts] == ["finished", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("changed", r"^ValueError: host 0: .*made with another config"),
        (
            "other data",
            r"hosts differ in their data .*\n  host 0: train .*\n  host 1: ",
        ),
        ("no folder", r"host 1: .*nowhere.*there is no such folder"),
    ],
)
def test_what_one_host_gets_wrong_both_say(pair, call, message):
    _, ((first, *_), (second, *_)) = pair
    assert first[call] == second[call]
    assert re.search(message, first[call], re.DOTALL), first[call]


@pytest.mark.slow
@pytest.mark.parametrize("heard_by", [(0, 1), (1,)])
def test_sigterm_to_any_host_stops_both_at_one_step(tmp_path, heard_by):
    """Clusters tell all hosts to end; who stops one by hand tells one."""
    both = _begin("stop", tmp_path)
    try:
        while not run_folder.read_metrics(tmp_path / "run") and not any(
            process.poll() for process in both
        ):
            time.sleep(0.01)
        for index in heard_by:
            both[index].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=300)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [x.returncode for x in both] == [128 + signal.SIGTERM] * 2, errors
    assert [("SIGTERM: this step" in x) for x in errors] == [
        index in heard_by for index in (0, 1)
    ]
    assert not any("Traceback" in x for x in errors), errors
    (said,) = re.findall(r"saved at step (\d+): the same command goes on", errors[0])
    with Checkpoints(tmp_path / "run" / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.latest_step() == int(said) < 24
        checkpoints.verify(int(said))
    (*_, error), _ = _start("stop", tmp_path)
    assert f"goes on from step {said}\n" in error
    lines = run_folder.read_metrics(tmp_path / "run")
    assert [x["step"] for x in lines if x["split"] == "train"] == list(range(1, 25))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "node0", "count": 2}, "hosts.coordinator=HOST:PORT"),
        ({"coordinator": "node0:1234"}, r"count=0, index=0: .*\(2 or more\)"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "from 0 to count - 1"),
        ({"count": 2}, "go with HOST:PORT of the first"),
        (
            {"coordinator": "auto", "index": 1},
            "leave them out for one host and for auto",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        hosts.start(**settings)


def test_one_of_several_hosts_that_was_not_told(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match=r"one of 4 hosts: .*hosts.coordinator=auto"):
        hosts.start()


def test_one_host_speaks_to_itself():
    hosts.start()
    assert hosts.shard() == (0, 1)
    assert hosts.told_by_first({"a": (1,)}) == {"a": (1,)}
    hosts.check_same("anything", "what it has")
    hosts.wait_for_all()
    assert_array_equal(hosts.sum_over_hosts(np.arange(3)), np.arange(3))
    assert_array_equal(hosts.arrays_of_first(np.arange(3)), np.arange(3))
    with pytest.raises(ValueError, match=r"^as it is$"), hosts.all_or_none():
        raise ValueError("as it is")
