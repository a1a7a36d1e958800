"""A run that is ended anywhere goes on by the same command, to the same bits."""

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
SAME = "the same command goes on; arrays, numbers and results are the same bits"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiled programs, which all share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def interruptible():
    """Children hear Ctrl-C, which a job in the background has them ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def arguments(folder, *more):
    return [f"--workdir={folder}/run", *options(folder / "home", **CHANGES), *more]


@pytest.fixture(scope="module")
def whole(compiled, tmp_path_factory):
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(compiled, *arguments(folder))
    assert run.end() == 0, run.text
    return folder


def finish(compiled, folder, whole):
    run = Run(compiled, *arguments(folder))
    assert run.end() == 0, run.text
    assert_same_run(folder / "run", whole / "run")
    return run


def test_killed_while_it_saves_and_asked_to_stop(compiled, whole, tmp_path, note):
    """The short form of what follows, on one run."""
    _ask_to_stop(compiled, tmp_path, signal.SIGTERM, note)
    run = Run(compiled, *arguments(tmp_path))
    harness.in_a_save(run, tmp_path, random.Random(0))
    assert run.end(signal.SIGKILL) == -signal.SIGKILL, run.text
    finish(compiled, tmp_path, whole)
    note("SIGKILL while a checkpoint is saved", SAME)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_sigkill_everywhere(compiled, whole, tmp_path, seed, note):
    """Five kills a run, one at each kind of moment; the seed draws when."""
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
            assert run.process.returncode == 0, run.text  # it was done before
    assert len(killed) >= 3
    finish(compiled, tmp_path, whole)
    for name in killed:
        note(f"SIGKILL {name}", SAME)


@pytest.mark.slow
def test_asked_to_stop_again_and_again(compiled, whole, tmp_path, note):
    for number in (signal.SIGTERM, signal.SIGINT):
        step = _ask_to_stop(compiled, tmp_path, number, note)
    assert f"resumes from step {step}\n" in finish(compiled, tmp_path, whole).text


def _ask_to_stop(compiled, folder, number, note):
    """Once it has begun; returns the step that was saved."""
    run = Run(compiled, *arguments(folder))
    run.wait_for(run.says("step "))
    assert run.end(number) == 128 + number, run.text
    assert (
        f"{number.name}: this step is finished and saved; a second signal" in run.text
    )
    assert "Traceback" not in run.text
    (said,) = [line for line in run.lines if line.startswith("saved at step")]
    step = int(said.split()[3].rstrip(":"))
    assert harness.newest_arrays(folder / "run")[0] == step
    note(f"{number.name} while training", f"saves, says so, ends with {128 + number}")
    return step


def test_a_second_signal_ends_it_at_once(tmp_path):
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


def test_it_is_heard_after_jax_has_joined_a_cluster():
    """`jax.distributed.initialize` takes SIGTERM for itself: it was swallowed."""
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
    ("name", "code", "said"),
    [("SIGINT", 130, "\nstopped by Ctrl-C\n"), ("SIGTERM", 143, "tidied\n")],
)
def test_other_work_ends_in_one_line(name, code, said):
    text = f"""
        import os, signal, sys, time
        from cra_jax.runtime import signals
        with signals.exit_in_one_line():
            try:
                os.kill(os.getpid(), signal.{name})
                time.sleep(60)
            finally:
                if "{name}" == "SIGTERM":
                    print("tidied", file=sys.stderr)
    """
    done = _python(text)
    assert (done.returncode, done.stderr) == (code, said)


def _python(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=harness.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
