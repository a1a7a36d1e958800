"""Crops cut out on the device are the host's, bit for bit."""

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
    """Noise of given sizes, which are known before an image is read."""

    def __init__(self, sizes):
        rng = np.random.default_rng(0)
        super().__init__(rng.integers(0, 256, (*s, 3), np.uint8) for s in sizes)
        self.shapes = np.array(sizes)


def assert_same_batches(sizes, *, steps: int = 4, seed: int = 0) -> None:
    """Compares the two paths over `steps` batches, through prefetching's door."""
    images = Images(sizes)
    batches = TrainBatches(
        images, np.arange(len(sizes)), batch_size=8, crop_px=CROP, seed=seed
    )
    kept = DeviceImages(images, crop_px=CROP, progress=False)
    for step in range(steps):
        on_host = batches.batch(step)
        del on_host["index"]
        wanted, found = split(on_host), kept.batch(batches.plan(step))
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@settings(max_examples=15, deadline=None)
@given(st.lists(SIDES, min_size=8, max_size=20), st.integers(0, 2**64 - 1))
def test_any_shapes_give_the_batches_of_the_host(sizes, seed):
    assert_same_batches(sizes, seed=seed)


def test_extreme_places_are_cut_right():
    """Crops as large as the image, and images of one row or column to spare."""
    exact = [(CROP, CROP)] * 4 + [(CROP, CROP + 1), (CROP + 1, CROP)] * 4
    assert_same_batches([*exact, (CROP, 90), (90, CROP)], steps=20)


def test_a_store_of_one_short_side_is_not_padded():
    images = Images([(9, 12), (20, 9), (9, 9)] * 3)
    kept = DeviceImages(images, crop_px=CROP, progress=False)
    assert kept._lines.nbytes == sum(image.nbytes for image in images)


def test_a_step_takes_what_is_cut_without_a_copy():
    """The images go to the devices once, and the batch stays where it was cut."""
    images = Images([(9, 12)] * 16)
    batches = TrainBatches(
        images, np.zeros(16, int), batch_size=16, crop_px=CROP, seed=0
    )
    kept = DeviceImages(images, crop_px=CROP, progress=False)
    plan = batches.plan(0)
    kept.batch(plan)  # compiles; what it holds of constants is sent then
    assert len(kept._lines.addressable_shards) == device_count() == 8

    def step(state, batch):
        total = batch["image"].astype(np.float32).sum()
        return {"x": state["x"] + all_mean(total)}, {}

    run = train_step(step)
    state, _ = run({"x": np.float32(0)}, kept.batch(plan))
    with jax.transfer_guard_device_to_device("disallow"):
        batch = kept.batch(plan)
        assert len(batch["image"].addressable_shards) == 8
        state, _ = run(state, batch)
    expected = 2 * batches.batch(0)["image"].sum() / 8
    np.testing.assert_allclose(state["x"], expected, rtol=1e-6)


def test_too_large_for_the_devices_is_refused_with_the_figures(monkeypatch):
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
    """As much of a device as `devices.free_bytes` asks."""

    def __init__(self, **stats):
        self._stats = stats

    def memory_stats(self):
        return self._stats


def test_free_memory_is_that_of_the_fullest_device(monkeypatch):
    devices = [
        Device(bytes_limit=100, bytes_in_use=30, num_allocs=2),
        Device(bytes_limit=100, bytes_in_use=60),
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert free_bytes() == 40


def test_free_memory_of_a_host_is_shared_by_its_devices(monkeypatch):
    """A CPU does not say; what the system says is within what it has."""
    monkeypatch.setattr(devices_module, "_available_bytes", lambda: 9_000)
    assert free_bytes() == 1_000  # of eight, and one share for the host
    monkeypatch.undo()
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0.001 * has < _available_bytes() <= has


def test_training_is_the_same_to_the_bit(tmp_path):
    """Both runs log the same numbers, and say where the images are."""
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


def test_images_that_are_streamed_cannot_stay(tmp_path):
    config = tiny_config.config(
        tmp_path, **{"data.on_device": True, "data.prepare": False}
    )
    with pytest.raises(ValueError, match=r"set data\.prepare=True or"):
        check_config.check(config)
