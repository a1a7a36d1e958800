"""Two real processes train as one, and what one of them gets wrong both say."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from cra_jax.inference import evaluate, run_options
from cra_jax.runtime import devices, hosts, run_directory
from cra_jax.training import train
from tests.helpers import one_of_two_hosts

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    return one_of_two_hosts.start("talk", tmp_path_factory.mktemp("talk"))


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


def test_a_step_is_of_all_rows_and_a_pass_of_all_images(talk):
    for said, *_ in talk:
        assert said["steps"] == [[22.5, 22.5], 7.5]
        logits, labels, share = said["scores"]
        assert labels == list(range(13))
        assert logits == [[i / 2, i / 2] for i in range(13)]
        assert share == 4  # of 8: 5, rounded up to four devices


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of a training of two hosts, and what `host_of_two.start` returns."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, one_of_two_hosts.start("train", folder)


@pytest.mark.slow
def test_two_hosts_give_the_numbers_of_one(pair, tmp_path):
    """Four devices of two hosts, against the eight of this one."""
    folder, _ = pair
    assert devices.device_count() == 8
    train.run(one_of_two_hosts.config(folder), tmp_path)
    two_epochs = one_of_two_hosts.config(folder, **{"train.epochs": 2})
    scores = train.run(two_epochs, tmp_path, allow_change=True)
    evaluate.run(run_options.from_config(two_epochs), tmp_path)
    expected = run_directory.read_metrics(tmp_path)
    found = run_directory.read_metrics(folder / "run")
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
            run_directory.read_results(run, split, "full")
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
    assert "resumes from step 2" in err
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "node0", "count": 2}, "hosts.coordinator=HOST:PORT"),
        ({"coordinator": "node0:1234"}, r"count=0, index=0: .*\(2 or more\)"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "from 0 to count - 1"),
        ({"count": 2}, "need coordinator=HOST:PORT of the first"),
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
    assert hosts.broadcast_from_first({"a": (1,)}) == {"a": (1,)}
    hosts.check_same("anything", "what it has")
    hosts.wait_for_all()
    assert_array_equal(hosts.sum_over_hosts(np.arange(3)), np.arange(3))
    assert_array_equal(hosts.broadcast_arrays(np.arange(3)), np.arange(3))
    with pytest.raises(ValueError, match=r"^as it is$"), hosts.all_or_none():
        raise ValueError("as it is")
