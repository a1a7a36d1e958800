"""Two processes where one is right, and two hosts of which one is told to stop."""

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


def test_of_two_processes_on_one_run_directory_the_second_is_refused(tmp_path, note):
    long = {"train.epochs": 1000, "checkpoint.every_steps": 4}
    more = [f"--workdir={tmp_path}/run", *options(tmp_path / "home", **long)]
    first = Run(tmp_path, *more)
    first.wait_for(first.says("step "))
    second = Run(tmp_path, *more)
    assert second.end() == 1
    assert f"process {first.process.pid} on" in second.text
    assert "Traceback" not in second.text
    assert first.process.poll() is None, first.text
    first.wait_for(lambda: list(tmp_path.glob("run/checkpoints/[0-9]*")))
    first.end(signal.SIGKILL)
    third = Run(tmp_path, *more)
    third.wait_for(third.says("resumes from step "))
    assert third.end(signal.SIGTERM) == 128 + signal.SIGTERM, third.text
    step, _ = harness.newest_arrays(tmp_path / "run")
    assert step > 0
    note(
        "a second process on the same run directory",
        "refused with the process that has it, which goes on; killed, it blocks nobody",
    )


@pytest.mark.parametrize("heard_by", [(0, 1), (1,)])
def test_sigterm_to_any_host_stops_both_at_one_step(tmp_path, heard_by, note):
    """Clusters tell all hosts to end; who stops one by hand tells one."""
    both = one_of_two_hosts.begin("stop", tmp_path)
    try:
        while not run_directory.read_metrics(tmp_path / "run") and not any(
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
    (said,) = re.findall(r"saved at step (\d+): run the same command", errors[0])
    with Checkpoints(tmp_path / "run" / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.latest_step() == int(said) < 24
        checkpoints.verify(int(said))
    (*_, error), _ = one_of_two_hosts.start("stop", tmp_path)
    assert f"resumes from step {said}\n" in error
    lines = run_directory.read_metrics(tmp_path / "run")
    assert [x["step"] for x in lines if x["split"] == "train"] == list(range(1, 25))
    note(
        "SIGTERM to one of two hosts, or to both",
        "both save at one step, say so, end with 143, and go on",
    )
