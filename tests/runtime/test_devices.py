"""Batches on eight simulated devices, and errors of wrong batch sizes."""

import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cra_jax.runtime import devices


def test_batch_size_that_does_not_divide_is_an_error_that_names_valid_sizes():
    with pytest.raises(ValueError, match=r"train.batch_size=20 .* 8 device.*16, 24"):
        devices.check_divides(20, setting="train.batch_size")
    devices.check_divides(24, setting="train.batch_size")


@pytest.mark.parametrize("size", [8, 0, -8, 5])
def test_too_few_images_on_each_device_are_an_error(size):
    with pytest.raises(ValueError, match=r"at least 2 images on each.*: 16 "):
        devices.check_divides(size, setting="train.batch_size", least=2)
    devices.check_divides(16, setting="train.batch_size", least=2)


def test_round_up_gives_multiples_of_the_device_count():
    assert [devices.round_up(n) for n in (1, 8, 9, 64)] == [8, 8, 16, 64]


def test_train_step_averages_over_devices_and_donates_the_state():
    def step(state, batch):
        total = devices.all_mean(batch["x"].sum())
        return {"x": state["x"] + total}, {"total": total}

    state = {"x": jnp.arange(3.0)}
    run = devices.train_step(step)
    first, metrics = run(state, devices.split({"x": np.arange(16.0)}))
    assert float(metrics["total"]) == 120 / 8
    # A copy: on CPUs, jax 0.11 donates no buffer that numpy holds.
    np.testing.assert_allclose(jnp.copy(first["x"]), np.arange(3) + 15)
    second, _ = run(first, devices.split({"x": np.arange(16.0)}))
    np.testing.assert_allclose(second["x"], np.arange(3) + 30)
    assert first["x"].is_deleted()


def test_eval_step_returns_results_in_the_order_of_the_batch():
    run = devices.eval_step(lambda scale, batch: {"y": scale * batch["x"]})
    x = np.arange(32.0).reshape(16, 2)
    np.testing.assert_array_equal(run(jnp.float32(3), {"x": x})["y"], 3 * x)
    assert len(jax.devices()) == devices.device_count() == 8


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only for glibc")
def test_keep_memory_avoids_page_faults():
    """Counts the page faults of new processes with and without `keep_freed_memory`."""
    code = """
import resource, threading
from cra_jax.runtime import devices

{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * 200_000_000
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

found = []
for _ in range(2):
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
print(found[1])
"""
    again = [
        int(subprocess.check_output([sys.executable, "-c", code.format(call=call)]))
        for call in ("", "devices.keep_freed_memory()")
    ]
    assert again[0] > 20 * again[1]
