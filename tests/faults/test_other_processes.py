"""Tests of two processes in one run directory, and of two hosts that are stopped."""

import re
import signal
import time

import pytest

from cra_jax.runtime import run_directory
from cra_jax.runtime.checkpoint import Checkpoints
from tests.faults import harness
from tests.faults.harness import Run, options
from tests.helpers import one_of_two_hosts

pytestmark = pytest.mark.slow


def test_a_second_process_in_a_run_directory_is_refused(tmp_path, note):
    long = {"train.epochs": 1000, "checkpoint.every_steps": 4}
    more = [f"--workdir={tmp_path}/run", *options(tmp_path / "home", **long)]
    first = Run(tmp_path, *more)
    first.wait_for(first.has_printed("step "))
    second = Run(tmp_path, *more)
    assert second.end() == 1
    assert f"process {first.process.pid} on" in second.text
    assert "Traceback" not in second.text
    assert first.process.poll() is None, first.text
    first.wait_for(lambda: list(tmp_path.glob("run/checkpoints/[0-9]*")))
    first.end(signal.SIGKILL)
    third = Run(tmp_path, *more)
    third.wait_for(third.has_printed("resumes from step "))
    assert third.end(signal.SIGTERM) == 128 + signal.SIGTERM, third.text
    step, _ = harness.newest_arrays(tmp_path / "run")
    assert step > 0
    note(
        "a second process in the same run directory",
        "an error that names the first process, which continues; after it is killed, "
        "the directory is free",
    )


@pytest.mark.parametrize("stopped", [(0, 1), (1,)])
def test_sigterm_to_any_host_stops_both_at_one_step(tmp_path, stopped, note):
    """Clusters send SIGTERM to all hosts; a user may send it to one."""
    both = one_of_two_hosts.begin("stop", tmp_path)
    try:
        while not run_directory.read_metrics(tmp_path / "run") and not any(
            process.poll() for process in both
        ):
            time.sleep(0.01)
        for index in stopped:
            both[index].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=300)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [x.returncode for x in both] == [128 + signal.SIGTERM] * 2, errors
    assert [("SIGTERM: this step" in x) for x in errors] == [
        index in stopped for index in (0, 1)
    ]
    assert not any("Traceback" in x for x in errors), errors
    (step,) = re.findall(r"saved at step (\d+): run the same command", errors[0])
    with Checkpoints(tmp_path / "run" / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.latest_step() == int(step) < 24
        checkpoints.verify(int(step))
    (*_, error), _ = one_of_two_hosts.start("stop", tmp_path)
    assert f"resumes from step {step}\n" in error
    lines = run_directory.read_metrics(tmp_path / "run")
    assert [x["step"] for x in lines if x["split"] == "train"] == list(range(1, 25))
    note(
        "SIGTERM to one of two hosts, or to both",
        "both save at the same step, report it, exit with status 143, and resume",
    )
