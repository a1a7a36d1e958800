"""Tests that an interrupted run resumes to bit-identical arrays."""

import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.faults import harness
from tests.faults.harness import Run, assert_same_run, options

CHANGES = {"train.epochs": 3, "checkpoint.every_steps": 4}
SAME = "the same command resumes; arrays, metrics and results are bit-identical"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Directory of compiled programs, shared by all tests."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def interruptible():
    """Child processes handle SIGINT and SIGHUP, which background jobs may ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hangup)


def arguments(folder, *more):
    return [f"--workdir={folder}/run", *options(folder / "home", **CHANGES), *more]


@pytest.fixture(scope="module")
def whole(compiled, tmp_path_factory):
    """Directory of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(compiled, *arguments(folder))
    assert run.end() == 0, run.text
    return folder


def finish(compiled, folder, whole):
    """Resumes a run and compares it with the uninterrupted one."""
    run = Run(compiled, *arguments(folder))
    assert run.end() == 0, run.text
    assert_same_run(folder / "run", whole / "run")
    return run


def test_sigterm_and_sigkill_during_a_save(compiled, whole, tmp_path, note):
    """A short version of the slow tests below, on one run."""
    _stop(compiled, tmp_path, signal.SIGTERM, note)
    run = Run(compiled, *arguments(tmp_path))
    harness.wait_for_a_save(run, tmp_path, random.Random(0))
    assert run.end(signal.SIGKILL) == -signal.SIGKILL, run.text
    finish(compiled, tmp_path, whole)
    note("SIGKILL while a checkpoint is saved", SAME)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_sigkill_at_each_kind_of_moment(compiled, whole, tmp_path, seed, note):
    """Five kills per run, one at each kind of moment, at times drawn from the seed."""
    seed += int(os.environ.get("CRA_JAX_KILL_SEED", "0"))
    rng = random.Random(seed)
    first, *others = harness.MOMENTS
    rng.shuffle(others)
    killed = []
    for name in (first, *others):
        run = Run(compiled, *arguments(tmp_path))
        harness.MOMENTS[name](run, tmp_path, rng)
        if run.end(signal.SIGKILL) == -signal.SIGKILL:
            killed.append(name)
        else:
            assert run.process.returncode == 0, run.text  # it finished first
    assert len(killed) >= 3
    finish(compiled, tmp_path, whole)
    for name in killed:
        note(f"SIGKILL {name}", SAME)


@pytest.mark.slow
def test_a_stopped_run_is_stopped_again(compiled, whole, tmp_path, note):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        step = _stop(compiled, tmp_path, number, note)
    assert f"resumes from step {step}\n" in finish(compiled, tmp_path, whole).text


def _stop(compiled, folder, number, note):
    """Stops a run by a signal after its first steps; returns the saved step."""
    run = Run(compiled, *arguments(folder))
    run.wait_for(run.has_printed("step "))
    assert run.end(number) == 128 + number, run.text
    assert (
        f"{number.name}: this step is finished and saved; a second signal" in run.text
    )
    assert "Traceback" not in run.text
    (line,) = [line for line in run.lines if line.startswith("saved at step")]
    step = int(line.split()[3].rstrip(":"))
    assert harness.newest_arrays(folder / "run")[0] == step
    note(
        f"{number.name} while training",
        f"saves a checkpoint, reports it, exits with status {128 + number}",
    )
    return step


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    code = """
        import os, signal, time
        from cra_jax.runtime import signals
        with signals.stop_on_signal("it is written down") as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.number == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
    """
    done = _python(code)
    assert done.returncode == -signal.SIGINT
    assert (
        done.stderr == "SIGTERM: it is written down; a second signal ends it at once\n"
    )


def test_a_closed_terminal_ends_the_process_once(tmp_path):
    """It sends SIGHUP more than once, and what is then printed is an error."""
    code = """
        import os, signal
        from cra_jax.runtime import signals
        os.close(2)
        with signals.stop_on_signal("it is written down") as asked:
            for name in ("HUP", "HUP", "TERM", "HUP"):
                os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
                assert asked.number == signal.SIGHUP
        with signals.exit_in_one_line(), signals.stop_on_signal("again") as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            print(asked.number)
    """
    done = _python(code)
    assert (done.returncode, done.stdout) == (0, "15\n")


def test_ignored_signals_stay_ignored(tmp_path):
    """As under nohup."""
    code = """
        import os, signal
        from cra_jax.runtime import signals
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with signals.exit_in_one_line(), signals.stop_on_signal("heard") as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked
    """
    assert _python(code).returncode == 0


def test_sigterm_is_handled_after_jax_distributed_initialize():
    """`jax.distributed.initialize` installs its own handler of SIGTERM."""
    code = """
        import os, signal, socket
        import jax
        from cra_jax.runtime import signals
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        jax.distributed.initialize(f"localhost:{port}", 1, 0)
        with signals.stop_on_signal("heard") as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            print(asked.number)
    """
    done = _python(code)
    assert done.stdout == "15\n", done.stderr


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("SIGINT", 130, "\nstopped by Ctrl-C\n"),
        ("SIGTERM", 143, "tidied\n"),
        ("SIGHUP", 129, "tidied\n"),
    ],
)
def test_other_commands_end_with_one_line(name, code, message):
    text = f"""
        import os, signal, sys, time
        from cra_jax.runtime import signals
        with signals.exit_in_one_line():
            try:
                os.kill(os.getpid(), signal.{name})
                time.sleep(60)
            finally:
                if "{name}" != "SIGINT":
                    print("tidied", file=sys.stderr)
    """
    done = _python(text)
    assert (done.returncode, done.stderr) == (code, message)


def _python(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=harness.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
