"""Training on two hosts: two processes, shared results and shared errors."""

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
def host_results(tmp_path_factory):
    """Returns the results, stdout and stderr of two hosts that communicate."""
    return one_of_two_hosts.start("communicate", tmp_path_factory.mktemp("communicate"))


def test_all_hosts_get_the_values_of_the_first(host_results):
    for index, (results, *_) in enumerate(host_results):
        assert results["shard"] == [index, 2]
        assert results["broadcast"] == {"text": "é 0"}
        assert results["arrays"] == [0, 1, 2]
        assert results["sum"] == [1, 3, 5]
        assert results["devices"] == "4 x cpu on 2 hosts"


def test_error_on_one_host_is_raised_on_both(host_results):
    for results, *_ in host_results:
        assert results["same"] is None
        expected = "ValueError: the hosts differ in looks:\n  host 0: like \n  host 1: "
        assert results["different"] == expected + "like me"
        assert results["fails"] == "ValueError: host 1: no such folder: mine"


def test_step_uses_all_rows_and_evaluation_all_images(host_results):
    for results, *_ in host_results:
        assert results["steps"] == [[22.5, 22.5], 7.5]
        logits, labels, share = results["scores"]
        assert labels == list(range(13))
        assert logits == [[i / 2, i / 2] for i in range(13)]
        assert share == 4  # half of 8, which is 5 rounded up to four devices


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Returns the directory and the outputs of a training on two hosts."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, one_of_two_hosts.start("train", folder)


@pytest.mark.slow
def test_two_hosts_give_the_metrics_of_one_host(pair, tmp_path):
    """Compares four devices on two hosts with eight devices on one host."""
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
            # Standard deviations depend on the device count, and times differ.
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
def test_only_the_first_host_writes_and_prints(pair):
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
    assert "hosts" not in saved  # other hosts may resume the run
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
def test_error_of_one_host_is_raised_on_both_hosts(pair, call, message):
    _, ((first, *_), (second, *_)) = pair
    assert first[call] == second[call]
    assert re.search(message, first[call], re.DOTALL), first[call]


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_wrong_host_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        hosts.start(**options)


def test_missing_host_options_on_several_hosts_are_an_error(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match=r"one of 4 hosts: .*hosts.coordinator=auto"):
        hosts.start()


def test_single_host_gets_its_own_values():
    hosts.start()
    assert hosts.shard() == (0, 1)
    assert hosts.broadcast_from_first({"a": (1,)}) == {"a": (1,)}
    hosts.check_same("anything", "what it has")
    hosts.wait_for_all()
    assert_array_equal(hosts.sum_over_hosts(np.arange(3)), np.arange(3))
    assert_array_equal(hosts.broadcast_arrays(np.arange(3)), np.arange(3))
    with pytest.raises(ValueError, match=r"^as it is$"), hosts.all_or_none():
        raise ValueError("as it is")
