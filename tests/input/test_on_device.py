"""Crops made on the device are bitwise equal to crops made on the host."""

import os

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cra_jax.input.batches import TrainBatches
from cra_jax.input.on_device import DeviceImages
from cra_jax.runtime import devices as devices_module
from cra_jax.runtime import run_directory
from cra_jax.runtime.devices import (
    _available_bytes,
    all_mean,
    device_count,
    free_bytes,
    split,
    train_step,
)
from cra_jax.training import check_config, train
from tests.helpers import tiny_config

CROP = 6
SIDES = st.tuples(st.integers(CROP, 30), st.integers(CROP, 30))


class Images(list):
    """Noise images of given sizes, with known shapes."""

    def __init__(self, sizes):
        rng = np.random.default_rng(0)
        super().__init__(rng.integers(0, 256, (*s, 3), np.uint8) for s in sizes)
        self.shapes = np.array(sizes)


def assert_same_batches(sizes, *, steps: int = 4, seed: int = 0) -> None:
    """Compares `steps` batches made on the device and on the host."""
    images = Images(sizes)
    batches = TrainBatches(
        images, np.arange(len(sizes)), batch_size=8, crop_px=CROP, seed=seed
    )
    on_device = DeviceImages(images, crop_px=CROP, progress=False)
    for step in range(steps):
        on_host = batches.batch(step)
        del on_host["index"]
        wanted, found = split(on_host), on_device.batch(batches.plan(step))
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@settings(max_examples=15, deadline=None)
@given(st.lists(SIDES, min_size=8, max_size=20), st.integers(0, 2**64 - 1))
def test_batches_of_any_shapes_equal_those_of_the_host(sizes, seed):
    assert_same_batches(sizes, seed=seed)


def test_crops_at_the_border_equal_those_of_the_host():
    """Crops as large as the image, or smaller by one row or column."""
    exact = [(CROP, CROP)] * 4 + [(CROP, CROP + 1), (CROP + 1, CROP)] * 4
    assert_same_batches([*exact, (CROP, 90), (90, CROP)], steps=20)


def test_images_with_one_short_side_are_not_padded():
    images = Images([(9, 12), (20, 9), (9, 9)] * 3)
    on_device = DeviceImages(images, crop_px=CROP, progress=False)
    assert on_device._lines.nbytes == sum(image.nbytes for image in images)


def test_training_step_uses_the_crops_without_a_copy():
    """Images are transferred once; crops stay on their device."""
    images = Images([(9, 12)] * 16)
    batches = TrainBatches(
        images, np.zeros(16, int), batch_size=16, crop_px=CROP, seed=0
    )
    on_device = DeviceImages(images, crop_px=CROP, progress=False)
    plan = batches.plan(0)
    on_device.batch(plan)  # compiles and transfers constants
    assert len(on_device._lines.addressable_shards) == device_count() == 8

    def step(state, batch):
        total = batch["image"].astype(np.float32).sum()
        return {"x": state["x"] + all_mean(total)}, {}

    run = train_step(step)
    state, _ = run({"x": np.float32(0)}, on_device.batch(plan))
    with jax.transfer_guard_device_to_device("disallow"):
        batch = on_device.batch(plan)
        assert len(batch["image"].addressable_shards) == 8
        state, _ = run(state, batch)
    expected = 2 * batches.batch(0)["image"].sum() / 8
    np.testing.assert_allclose(state["x"], expected, rtol=1e-6)


def test_images_too_large_for_the_devices_are_an_error(monkeypatch):
    monkeypatch.setattr(devices_module, "free_bytes", lambda: 2_000_000)
    images = Images([(100, 200)] * 40)
    match = (
        r"data.on_device: 40 training images take 2.4 MB of 2.0 MB free on "
        r"each of 8 x cpu: set data.on_device=False"
    )
    with pytest.raises(ValueError, match=match):
        DeviceImages(images, crop_px=CROP)
    monkeypatch.setattr(devices_module, "free_bytes", lambda: 2_400_000)
    DeviceImages(images, crop_px=CROP, progress=False)


class Device:
    """The part of a device that `devices.free_bytes` uses."""

    def __init__(self, **stats):
        self._stats = stats

    def memory_stats(self):
        return self._stats


def test_free_bytes_is_the_minimum_over_devices(monkeypatch):
    devices = [
        Device(bytes_limit=100, bytes_in_use=30, num_allocs=2),
        Device(bytes_limit=100, bytes_in_use=60),
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert free_bytes() == 40


def test_free_bytes_of_a_host_is_divided_by_its_devices(monkeypatch):
    """A CPU has no memory statistics; the system's value is used instead."""
    monkeypatch.setattr(devices_module, "_available_bytes", lambda: 9_000)
    assert free_bytes() == 1_000  # 9 shares: eight devices and the host
    monkeypatch.undo()
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0.001 * total_bytes < _available_bytes() <= total_bytes


def test_training_metrics_are_equal_on_device_and_on_host(tmp_path):
    """Compares all metrics except times."""
    logged = []
    for on_device in (False, True):
        config = tiny_config.config(
            tmp_path / "cache",
            **{
                "data.on_device": on_device,
                "train.epochs": 1,
                "model.kind": "baseline",
            },
        )
        workdir = tmp_path / str(on_device)
        train.run(config, workdir)
        lines = run_directory.read_metrics(workdir)
        timed = {"images_per_second", "eta_seconds"}
        logged.append([{k: x[k] for k in x.keys() - timed} for x in lines])
    assert logged[0] == logged[1]
    assert {x["split"] for x in logged[0]} == {"train", "test", "test_shifted"}


def test_on_device_with_streamed_images_is_an_error(tmp_path):
    config = tiny_config.config(
        tmp_path, **{"data.on_device": True, "data.prepare": False}
    )
    with pytest.raises(ValueError, match=r"set data\.prepare=True or"):
        check_config.check(config)
