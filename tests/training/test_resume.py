"""What a resumed run finds out about changed data and a changed config."""

import dataclasses

import pytest

from cra_jax.input import splits
from cra_jax.input.records import Dataset, Record
from cra_jax.runtime import run_directory
from cra_jax.training import build, resume
from tests.helpers import tiny_config

TRAIN = {"a/0": 0, "a/1": 0, "b/0": 1, "b/1": 1}
TEST = {"a/2": 0, "b/2": 1}


def _dataset(train=TRAIN, test=TEST, *, content=None, drawn=False, names=("a", "b")):
    """A dataset of names and labels; an image's content is its name by default."""

    def records(listed):
        return tuple(
            Record(
                name,
                label,
                lambda _: pytest.fail("no image is decoded"),
                "",
                content=lambda name=name: (content or {}).get(name, name).encode(),
            )
            for name, label in listed.items()
        )

    return Dataset(
        "folder", names, {"train": records(train), "test": records(test)}, drawn=drawn
    )


def _before(tmp_path, dataset, **meta):
    """What a checkpoint of a run on this dataset knows."""
    listed = {x: splits.list_images(r) for x, r in dataset.splits.items()}
    run_directory.write_data(tmp_path, run_directory.TrainedData(listed))
    kept = run_directory.read_data(tmp_path)
    assert kept is not None
    digests = {name: splits.digest(images) for name, images in listed.items()}
    return {
        "step": 3,
        "class_names": list(dataset.class_names),
        "data": digests,
        "kept": kept.to_json(),
        **meta,
    }


def _without(listed, *names):
    return {name: label for name, label in listed.items() if name not in names}


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"names": ("b", "z")}, r"class 'b' where .* 'a' \(new: 'z', missing: 'a'\)"),
        ({"content": {"b/1": "other"}}, "train: b/1 has other content:"),
        ({"content": {"a/2": "b/2", "b/2": "a/2"}}, "test: a/2 .* 1 more differences"),
        ({"train": TRAIN | {"b/1": 0}}, "train: b/1 has label 0 instead of 1"),
        ({"train": TRAIN | {"b/3": 1}}, "train: b/3 is new"),
        ({"test": _without(TEST, "b/2")}, "test: b/2 is missing"),
        (
            {"train": _without(TRAIN, "a/0"), "test": TEST | {"a/0": 0}},
            "a/0 moved from train to test",
        ),
        (
            {"train": TRAIN | {"a/2": 0}, "test": _without(TEST, "a/2")},
            "a/2 moved from test to train",
        ),
        ({"train": dict(reversed(TRAIN.items()))}, "the order of the images"),
    ],
)
def test_changed_data_is_an_error_that_names_the_first_difference(
    tmp_path, now, message
):
    before = _before(tmp_path, _dataset())
    same = resume.check_data(_dataset(), before, tmp_path, allow_change=False)
    assert not same.warnings
    with pytest.raises(ValueError, match=message):
        resume.check_data(_dataset(**now), before, tmp_path, allow_change=False)


def test_without_the_list_of_images_a_change_names_its_split(tmp_path):
    before = _before(tmp_path, _dataset()) | {"kept": None}
    changed = _dataset(content={"a/2": "other"})
    assert not resume.check_data(
        _dataset(), before, tmp_path, allow_change=False
    ).warnings
    with pytest.raises(ValueError, match="the images of the split 'test'"):
        resume.check_data(changed, before, tmp_path, allow_change=False)


def test_allowed_change_is_a_warning_and_is_listed(tmp_path):
    before = _before(tmp_path, _dataset())
    changed = _dataset(train=_without(TRAIN, "a/0"))
    checked = resume.check_data(changed, before, tmp_path, allow_change=True)
    assert "since step 3" in checked.warnings[0]
    assert "train: a/0 is missing" in checked.warnings[0]
    assert [x.name for x in checked.listed.splits["train"]] == ["a/1", "b/0", "b/1"]
    # It was trained on, and must not be tested later.
    kept = before | {"kept": checked.listed.to_json()}
    later = _dataset(train=_without(TRAIN, "a/0"), test=TEST | {"new": 0},
                     content={"new": "a/0"})  # fmt: skip
    with pytest.raises(ValueError, match="1 images of the split 'test' were trained"):
        resume.check_data(later, kept, tmp_path, allow_change=True)


@pytest.mark.parametrize("now", [{"a/3": 0}, {"renamed": 0}, {"a/1": 0, "a/3": 0}])
def test_a_drawn_split_stays_as_it_was_drawn(tmp_path, now):
    """An image that was trained on is not tested, whatever is drawn now."""
    before = _before(tmp_path, _dataset(drawn=True))
    drawn_now = _dataset(
        train=_without(TRAIN, "a/0", "a/1") | {"a/2": 0},
        test={"b/2": 1, **now},
        content={"renamed": "a/1"},
        drawn=True,
    )
    checked = resume.check_data(drawn_now, before, tmp_path, allow_change=True)
    found = {x: [r.name for r in rows] for x, rows in checked.dataset.splits.items()}
    known = [name for name in ("a/1", "renamed") if name in now]
    assert found["train"] == [*known, "b/0", "b/1"]
    assert found["test"] == ["a/2", "b/2", *(["a/3"] if "a/3" in now else [])]
    assert set(checked.listed.splits["train"]) == set(
        splits.list_images(checked.dataset.splits["train"])
    )


def test_moved_images_of_a_given_split_are_not_tested(tmp_path):
    before = _before(tmp_path, _dataset())
    moved = _dataset(train=_without(TRAIN, "b/0"), test=TEST | {"b/9": 1},
                     content={"b/9": "b/0"})  # fmt: skip
    with pytest.raises(ValueError, match="the first b/9: remove them from it"):
        resume.check_data(moved, before, tmp_path, allow_change=True)
    # A copy that was in both splits from the start is no change.
    copied = _dataset(content={"a/2": "a/0"})
    before = _before(tmp_path, copied)
    checked = resume.check_data(
        dataclasses.replace(copied), before, tmp_path, allow_change=False
    )
    assert not checked.warnings


@pytest.mark.parametrize(
    ("old", "now", "messages"),
    [
        ({}, {}, []),
        (
            {},
            {"train.batch_size": 8},
            [
                "this was the end of epoch 1 (3 steps each) and is now step 3 of 6 of "
                "epoch 1",
                "training ends at step 24 instead of 12",
                "train.batch_size: 16 in the run directory, 8 now",
            ],
        ),
        (
            {"optim.schedule": "cosine", "train.epochs": 2},
            {"train.epochs": 8},
            [
                "training ends at step 24 instead of 6",
                "the learning rate after step 3 is 0.0481 instead of 0.025",
                "train.epochs: 2 in the run directory, 8 now",
            ],
        ),
        (
            {},
            {"restriction.first_epochs": 1},
            ["L_res is off instead of on after step 3", "restriction.first_epochs"],
        ),
        (
            {},
            {"optim.freeze_first_epochs": 1, "optim.freeze_period_epochs": 1},
            ["the training of N_cls is off instead of on", "freeze_f", "freeze_p"],
        ),
        ({}, {"seed": 1}, ["seed: 0 in the run directory, 1 now"]),
    ],
)
def test_moves_at_a_resumed_step_are_described(tmp_path, old, now, messages):
    old = {"train.epochs": 4} | old
    configs = [tiny_config.config(tmp_path, **changes) for changes in (old, old | now)]
    before = {
        "step": 3,
        "steps_per_epoch": 3,
        "config": build.config_without_hosts(configs[0]),
    }
    moves = resume.describe_moves(
        before,
        configs[1],
        steps_per_epoch=48 // configs[1].train.batch_size,
        train_size=48,
    )
    assert len(moves) == len(messages), moves
    for move, message in zip(moves, messages, strict=True):
        assert message in move
    # A checkpoint of an older version does not have its number of steps.
    del before["steps_per_epoch"]
    again = resume.describe_moves(
        before,
        configs[1],
        steps_per_epoch=48 // configs[1].train.batch_size,
        train_size=48,
    )
    assert again == moves
