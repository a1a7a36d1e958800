"""Training batches as a function of (seed, epoch, index); evaluation batches."""

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cra_jax.input.batches import TrainBatches, center_batches, full_batches
from cra_jax.runtime import devices as devices_module
from cra_jax.runtime.prefetch import prefetch

CROP = 8


def index_of(image: np.ndarray) -> int:
    """Returns the index that `numbered` wrote into the third channel."""
    return int(image[0, 0, 2])


def numbered(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Makes images whose pixel at (y, x) is (y, x, index)."""
    images = []
    for i, (height, width) in enumerate(sizes):
        y, x = np.mgrid[:height, :width]
        images.append(np.stack([y, x, np.full_like(y, i)], -1).astype(np.uint8))
    return images


def train(
    count=21, *, sizes=None, seed=0, batch_size=4, flip=True, shard=(0, 1)
) -> TrainBatches:
    sizes = sizes or [(10 + i % 5, 9 + i % 7) for i in range(count)]
    labels = [i % 3 for i in range(len(sizes))]
    return TrainBatches(
        numbered(*sizes),
        labels,
        batch_size=batch_size,
        crop_px=CROP,
        seed=seed,
        flip=flip,
        shard=shard,
    )


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_images_and_labels_of_a_batch_match_its_index():
    batches = train()
    for step in range(3 * batches.steps_per_epoch):
        batch = batches.batch(step)
        assert batch["image"].shape == (4, CROP, CROP, 3)
        dtypes = {name: value.dtype for name, value in batch.items()}
        assert dtypes == {
            "image": np.uint8,
            "flip": np.bool_,
            "label": np.int32,
            "index": np.int32,
        }
        assert [index_of(image) for image in batch["image"]] == batch["index"].tolist()
        np.testing.assert_array_equal(batch["label"], batch["index"] % 3)


def test_crops_are_unflipped_windows_of_the_image():
    y, x = np.mgrid[:CROP, :CROP]
    for image in train().batch(0)["image"]:
        np.testing.assert_array_equal(image[..., 0], y + image[0, 0, 0])
        np.testing.assert_array_equal(image[..., 1], x + image[0, 0, 1])


@pytest.mark.parametrize(("workers", "depth"), [(1, 1), (4, 1), (1, 8), (4, 8)])
def test_batches_do_not_depend_on_workers_and_depth(workers, depth):
    # Two objects, because one may cache values.
    ahead = prefetch(train().batch, 3, 18, workers=workers, depth=depth)
    plain = train()
    for step, batch in zip(range(3, 18), ahead, strict=True):
        assert_same(batch, plain.batch(step))


def test_resumed_batches_equal_uninterrupted_batches():
    whole = [train().batch(step) for step in range(12)]
    for step in reversed(range(12)):  # in reverse order, each from a new object
        assert_same(train().batch(step), whole[step])


def test_batches_have_not_changed():
    """The order must not depend on NumPy's version, the machine or code changes."""
    batches = train()
    digest = hashlib.sha256()
    for step in range(12):
        for _, value in sorted(batches.batch(step).items()):
            digest.update(np.ascontiguousarray(value).tobytes())
    assert batches.batch(0)["index"].tolist() == [10, 2, 8, 9]
    assert digest.hexdigest() == (
        "3df0e121f52706a634faab99cab3d89dff5946d1eb80d0597e3e30e7bc4f5029"
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_every_image_occurs_at_most_once_an_epoch(count, batch_size, seed):
    batch_size = min(batch_size, count)
    batches = train(count, seed=seed, batch_size=batch_size)
    steps = batches.steps_per_epoch
    assert steps * batch_size + batches.dropped_per_epoch == count
    for epoch in range(2):
        index = np.concatenate(
            [batches.batch(epoch * steps + i)["index"] for i in range(steps)]
        )
        assert len(set(index.tolist())) == len(index) == steps * batch_size


def test_dropped_images_differ_between_epochs():
    batches = train(7, batch_size=4)
    assert (batches.steps_per_epoch, batches.dropped_per_epoch) == (1, 3)
    seen = [frozenset(batches.batch(step)["index"].tolist()) for step in range(30)]
    assert len(set(seen)) > 10
    assert frozenset.union(*seen) == frozenset(range(7))


def test_seed_and_epoch_change_order_crops_and_flips():
    def drawn(seed, epoch):
        """Returns the order, and crops and flips sorted by image."""
        batches = train(20, sizes=[(30, 30)] * 20, seed=seed, batch_size=20)
        batch = batches.batch(epoch)
        sort = np.argsort(batch["index"])
        corner = batch["image"][sort, 0, 0]
        return [batch["index"], corner[:, 0], corner[:, 1], batch["flip"][sort]]

    base = drawn(0, 0)
    for other in (drawn(1, 0), drawn(0, 1), drawn(2**64 - 1, 0)):
        for one, two in zip(base, other, strict=True):
            assert not np.array_equal(one, two)


def test_crops_and_flips_do_not_depend_on_the_batch_size():
    def drawn(batch_size):
        batches = train(20, batch_size=batch_size)
        rows = {}
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(step)
            for i, image, flip in zip(
                batch["index"], batch["image"], batch["flip"], strict=True
            ):
                rows[int(i)] = (image.tobytes(), bool(flip))
        return rows

    assert drawn(4) == drawn(10)


def test_crops_and_flips_are_uniform_and_independent():
    """Chi-square test of all crop positions and flips against uniform."""
    starts = (4, 4)  # the crop can start in 4 rows and 4 columns
    size = (CROP + starts[0] - 1, CROP + starts[1] - 1)
    batches = train(sizes=[size] * 60, batch_size=60)
    counts = np.zeros((*starts, 2))
    for epoch in range(100):
        batch = batches.batch(epoch)
        corner = batch["image"][:, 0, 0].astype(int)
        np.add.at(counts, (corner[:, 0], corner[:, 1], batch["flip"].astype(int)), 1)
    expected = counts.sum() / counts.size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert counts.sum() == 6000
    assert chi_square < 61.1  # 31 degrees of freedom, 0.1 %; the seed is fixed


def test_order_is_uniformly_random():
    """All orders of 4 are equally likely; images 2i and 2i + 1 are contrast pairs."""
    batches = train(4, batch_size=4)
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for epoch in range(2400):
        counts[tuple(batches.batch(epoch)["index"].tolist())] += 1
    chi_square = sum((n - 100) ** 2 / 100 for n in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom, 0.1 %; the seed is fixed


def test_flip_false_changes_no_crop():
    on, off = train().batch(0), train(flip=False).batch(0)
    assert on["flip"].any()
    assert not off["flip"].any()
    np.testing.assert_array_equal(on["image"], off["image"])


@pytest.mark.parametrize("batch_size", [1, 4, 7, 21, 50])
def test_center_batches_have_every_image_once(batch_size):
    sizes = [(10 + i % 5, 9 + i % 7) for i in range(21)]
    batches = center_batches(
        numbered(*sizes), range(21), batch_size=batch_size, crop_px=CROP
    )
    assert len(batches) == -(-21 // batch_size)
    for _ in range(2):  # the second iteration gives the same batches
        counted = []
        for batch in batches:
            valid = batch["valid"]
            assert batch["image"].shape == (batch_size, CROP, CROP, 3)
            counted += batch["index"][valid].tolist()
            np.testing.assert_array_equal(batch["label"][valid], batch["index"][valid])
            assert not batch["image"][~valid].any()
            assert (batch["index"][~valid] == -1).all()
            for i, image in zip(batch["index"], batch["image"], strict=True):
                if i >= 0:
                    height, width = sizes[i]
                    corner = [(height - CROP) // 2, (width - CROP) // 2, i]
                    assert image[0, 0].tolist() == corner
        assert counted == list(range(21))


class Sized(list):
    """Images with known sizes that count the reads."""

    def __init__(self, images):
        super().__init__(images)
        self.shapes = np.array([image.shape[:2] for image in images])
        self.reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


SIZES = [(8, 11), (8, 16), (12, 8), (8, 11), (9, 16), (8, 9), (16, 8), (8, 11)]


@pytest.mark.parametrize("bucket_px", [0, 1, 4, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("make", [Sized, list])
def test_full_batches_have_every_image_and_pixel_once(bucket_px, batch_size, make):
    images = numbered(*SIZES)
    batches = full_batches(
        make(images), range(8), batch_size=batch_size, bucket_px=bucket_px
    )
    counted = []
    for number, batch in enumerate(batches):
        assert_same(batch, batches[number])
        shape = batch["image"].shape
        assert shape[0] == batch_size
        assert not batch["image"][~batch["valid"]].any()
        assert (batch["extent_px"][~batch["valid"]] == shape[1:3]).all()
        rows = zip(*(batch[k] for k in ("index", "label", "image")), strict=True)
        for row, (i, label, image) in enumerate(rows):
            if i < 0:
                continue
            counted.append(int(i))
            height, width = batch["extent_px"][row]
            assert ((height, width), label) == (SIZES[i], i)
            step = max(bucket_px, 1)
            assert shape[1:3] == (-(-height // step) * step, -(-width // step) * step)
            np.testing.assert_array_equal(image[:height, :width], images[i])
            assert not image[height:].any()
            assert not image[:, width:].any()
    assert sorted(counted) == list(range(8))


def test_full_batches_read_no_image_to_get_a_known_size():
    images = Sized(numbered(*SIZES))
    batches = full_batches(images, range(8), batch_size=3, bucket_px=4)
    assert images.reads == 0
    assert sum(batch["valid"].sum() for batch in batches) == images.reads == 8


def test_full_batches_are_grouped_by_size_in_the_order_of_the_split():
    batches = full_batches(numbered(*SIZES), range(8), batch_size=2, bucket_px=0)
    assert [batch["index"].tolist() for batch in batches] == [
        [5, -1],  # 8 x 9
        [0, 3],  # 8 x 11
        [7, -1],
        [1, -1],  # 8 x 16
        [4, -1],  # 9 x 16
        [2, -1],  # 12 x 8
        [6, -1],  # 16 x 8
    ]


def joined(batches: list[dict]) -> dict:
    """Concatenates the rows of several batches."""
    return {
        name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]
    }


@settings(max_examples=30, deadline=None)
@given(
    hosts=st.integers(1, 6),
    share=st.integers(1, 5),
    spare=st.integers(0, 20),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 10_000),
)
def test_concatenated_batches_of_hosts_are_the_whole_batch(
    hosts, share, spare, seed, step
):
    batch_size = hosts * share
    kwargs: Any = {"batch_size": batch_size, "seed": seed}
    count = batch_size + spare
    parts = [train(count, shard=(i, hosts), **kwargs).batch(step) for i in range(hosts)]
    assert all(len(part["image"]) == share for part in parts)
    assert_same(joined(parts), train(count, **kwargs).batch(step))


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_shards_of_an_epoch_are_disjoint_and_cover_the_split(hosts):
    per_host = [train(30, batch_size=6, shard=(i, hosts)) for i in range(hosts)]
    for epoch in range(2):
        steps = range(5 * epoch, 5 * epoch + 5)
        seen = [
            np.concatenate([batches.batch(step)["index"] for step in steps])
            for batches in per_host
        ]
        assert [len(index) for index in seen] == [30 // hosts] * hosts
        assert sorted(np.concatenate(seen).tolist()) == list(range(30))


@pytest.mark.parametrize(("hosts", "devices"), [(1, 1), (1, 8), (2, 4), (4, 2), (8, 1)])
def test_devices_of_all_hosts_get_parts_of_the_same_batch(hosts, devices, monkeypatch):
    """Device k of n gets rows k b/n to (k + 1) b/n, on any host."""
    monkeypatch.setattr("jax.local_device_count", lambda: devices)
    parts = []
    for i in range(hosts):
        ahead = prefetch(
            train(40, batch_size=16, shard=(i, hosts)).batch, 0, 5, workers=2
        )
        parts.append([devices_module.split(batch) for batch in ahead])
    whole = train(40, batch_size=16)
    for step, split in enumerate(zip(*parts, strict=True)):
        of_devices = joined(list(split))
        n = hosts * devices
        assert of_devices["image"].shape[:2] == (n, 16 // n)
        rows = {k: v.reshape(-1, *v.shape[2:]) for k, v in of_devices.items()}
        assert_same(rows, whole.batch(step))


@pytest.mark.parametrize("make", [list, lambda images: Sized(images)])
def test_plan_is_the_batch_without_its_pixels(make):
    sizes = [(10 + i % 5, 9 + i % 7) for i in range(21)]
    images = make(numbered(*sizes))
    batches = TrainBatches(
        images, [0] * 21, batch_size=4, crop_px=CROP, seed=3, shard=(1, 2)
    )
    plans = [batches.plan(step) for step in range(12)]
    assert getattr(images, "reads", 0) == 0  # known sizes need no read
    for step, plan in enumerate(plans):
        batch = batches.batch(step)
        corner = batch.pop("image")[:, 0, 0, :2]  # `numbered` wrote (y, x) there
        np.testing.assert_array_equal(plan.pop("corner_px"), corner)
        assert_same(plan, batch)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_evaluate_disjoint_rows_in_equally_many_batches(hosts):
    for make, extra in (
        (center_batches, {"crop_px": CROP}),
        (full_batches, {"bucket_px": 4}),
    ):
        images = numbered(*SIZES, (13, 8))
        kwargs: Any = {"batch_size": 4, **extra}
        whole = make(images, range(9), **kwargs)
        parts = [
            make(images, range(9), shard=(i, hosts), **kwargs) for i in range(hosts)
        ]
        assert {len(part) for part in parts} == {len(whole)}
        for number, batch in enumerate(whole):
            assert_same(joined([part[number] for part in parts]), batch)


def test_batch_size_that_hosts_cannot_share_is_an_error():
    match = r"a batch of 4 images cannot be shared evenly by 3 hosts: .*multiple of 3"
    with pytest.raises(ValueError, match=match):
        train(shard=(0, 3))
    kwargs: Any = {"batch_size": 4, "shard": (0, 3)}
    with pytest.raises(ValueError, match=match):
        center_batches(numbered((9, 9)), [0], crop_px=8, **kwargs)
    with pytest.raises(ValueError, match=match):
        full_batches(numbered((9, 9)), [0], bucket_px=4, **kwargs)
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"shard is .*: give \(i, n\)"):
            train(shard=shard)


def test_too_few_images_for_a_batch_are_an_error():
    with pytest.raises(ValueError, match=r"set train.batch_size to 3 or less"):
        train(3, batch_size=4)


@pytest.mark.parametrize("make", [Sized, list])
def test_image_smaller_than_the_crop_is_an_error(make):
    images = make(numbered((9, 9), (12, 7), (9, 9)))
    kwargs: dict[str, Any] = {"batch_size": 3, "crop_px": 8}
    match = r"image 1 is 12 x 7 .*data.crop_px to 7 or less, or data.short_side_px"
    with pytest.raises(ValueError, match=match):
        TrainBatches(images, [0, 0, 0], seed=0, **kwargs).batch(0)
    with pytest.raises(ValueError, match=match):
        list(center_batches(images, [0, 0, 0], **kwargs))


def test_known_sizes_are_checked_before_the_first_batch():
    with pytest.raises(ValueError, match="image 1 is 12 x 7"):
        center_batches(
            Sized(numbered((9, 9), (12, 7))), [0, 0], batch_size=1, crop_px=8
        )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"labels": [0, 0]}, "for 3 images: give one integer per image"),
        ({"labels": [0.5, 1, 2]}, "labels are float64"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"crop_px": 0}, "data.crop_px is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "between 0 and 2"),
        ({"images": []}, "the split has no images"),
    ],
)
def test_wrong_arguments_are_errors(changes: dict[str, Any], match: str):
    arguments: dict[str, Any] = {
        "images": numbered((9, 9), (9, 9), (9, 9)),
        "labels": [0, 1, 2],
        "batch_size": 3,
        "crop_px": 8,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=match):
        TrainBatches(**(arguments | changes))


def test_negative_step_or_bucket_px_is_an_error():
    with pytest.raises(ValueError, match="step is -1"):
        train().batch(-1)
    with pytest.raises(ValueError, match="bucket_px is -8"):
        full_batches(numbered((9, 9)), [0], batch_size=1, bucket_px=-8)


def test_images_of_another_dtype_or_rank_are_errors():
    grey = [np.zeros((9, 9), np.uint8)]
    floats = [np.zeros((9, 9, 3))]
    for images in (grey, floats):
        with pytest.raises(ValueError, match=r"give uint8 \[h, w, 3\]"):
            center_batches(images, [0], batch_size=1, crop_px=8)[0]
