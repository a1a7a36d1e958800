"""Opening a split: unreadable images, and boxes that do not fit."""

from pathlib import Path

import pytest

from cra_jax.datasets import sources
from cra_jax.inference import run_options
from cra_jax.input import splits
from tests.helpers import tiny_config
from tests.helpers.dataset_folders import save_image, tree

FILES = [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "ab" for i in "01"]


def open_split(tmp_path: Path, name: str, source: str = "folder", **changes):
    path = tmp_path / "list.csv" if source == "csv" else tmp_path
    data = {"source": source, "path": str(path), "skip_unreadable": True, **changes}
    config = tiny_config.config(
        tmp_path / "cache", **{f"data.{key}": value for key, value in data.items()}
    )
    dataset = sources.load(source, path)
    return splits.open_split(run_options.from_config(config).data, dataset, name)


@pytest.mark.parametrize("skipped", [1, 2])
def test_class_without_a_readable_training_image_is_an_error(tmp_path, skipped):
    tree(tmp_path, *FILES)
    for i in range(skipped):
        (tmp_path / f"train/b/{i}.png").write_bytes(b"damaged")
    if skipped == 1:
        assert open_split(tmp_path, "train").labels.tolist() == [0, 0, 1]
    else:
        message = "1 classes have no readable image in 'train': b; repair"
        with pytest.raises(ValueError, match=message):
            open_split(tmp_path, "train")


def test_class_without_a_readable_test_image_is_a_warning(tmp_path, capsys):
    tree(tmp_path, *FILES)
    for i in range(2):
        (tmp_path / f"test/a/{i}.png").write_bytes(b"damaged")
    assert open_split(tmp_path, "test").labels.tolist() == [1, 1]
    assert "no readable image in 'test': a; they are not" in capsys.readouterr().err


def test_skip_unreadable_without_the_image_cache_is_an_error(tmp_path):
    tree(tmp_path, *FILES)
    with pytest.raises(ValueError, match=r"data\.prepare=True, or data.skip_unread"):
        open_split(tmp_path, "train", prepare=False)


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ("12,0,40,9", "lies outside"),
        ("4,3,40,30", "lies outside"),  # of a larger copy of the image
        ("3,3,3.5,3.5", "is smaller than a pixel"),
        ("-2,-1,14,11", ""),
    ],
)
def test_boxes_that_do_not_fit_their_images_are_errors(tmp_path, box, problem):
    rows = ["path,label,split,x_min,y_min,x_max,y_max"]
    for i in range(4):
        save_image(tmp_path / f"{i}.png", size=(12, 10))
        rows.append(f"{i}.png,{'ab'[i % 2]},{'train' if i < 2 else 'test'},{box}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    if problem:
        message = f"2 of 2 boxes cannot be used:\n.*2.png: its box .* {problem}, the"
        with pytest.raises(ValueError, match=message):
            open_split(tmp_path, "test", "csv")
    else:
        assert open_split(tmp_path, "test", "csv").boxes == ((0, 0, 1, 1),) * 2
