"""Tests of damaged checkpoints: damage is detected, or the arrays are unchanged."""

import gc
import os
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cra_jax.inference import evaluate, export, restore, run_options
from cra_jax.runtime.checkpoint import Checkpoints, DamagedError
from tests.helpers import tiny_run

# Pending reads of tensorstore end after their event loop if another read fails.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

STEPS = (6, 7)


@pytest.fixture(autouse=True)
def collect_garbage():
    """Collects what those reads leave before tests of other files run."""
    yield
    gc.collect()


def state(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "classification_stream": {"kernel": rng.normal(size=(64, 65))},
            "regularization_stream": {"kernel": rng.normal(size=(64, 65))},
        },
        "step": np.int32(seed),
    }


def saved(folder: Path) -> Path:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step in STEPS:
            meta = {"class_names": ["a", "b"], "epoch": step}
            checkpoints.save(step, state(step), meta, metric=step / 10)
    return folder


def same(one, two) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, two)))


def outcome(folder: Path) -> str:
    """Reads and resumes a run whose newest checkpoint was changed.

    Returns:
      "found": reading is an error, and training resumes from the previous checkpoint.
      "harmless": both return the saved arrays.
    """
    newest, before = STEPS[1], STEPS[0]
    try:
        with Checkpoints(folder / "checkpoints", writable=False) as checkpoints:
            if checkpoints.choose("latest") == newest:
                checkpoints.meta(newest)
                found = checkpoints.restore(newest, state(0))
                assert same(found, state(newest)), (
                    "a wrong array was read without an error"
                )
                read = "harmless"
            else:
                read = "found"  # the directory itself is missing
    except DamagedError as error:
        read = "found" if f"/checkpoints/{newest} is damaged" in str(error) else ""
    warnings = []
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.move_damaged(warnings.append) or 0
        assert step == (newest if read == "harmless" else before)
        assert same(checkpoints.restore(step, state(0)), state(step))
        # The run resumes and saves the step again.
        checkpoints.save(newest, state(newest), {}, metric=0.9)
        checkpoints.wait()
        assert same(checkpoints.restore(newest, state(0)), state(newest))
        assert checkpoints.best_step() == newest
    assert len(warnings) == (
        read == "found" and (folder / "damaged_checkpoints").exists()
    )
    return read


def truncate(file: Path, tenth: int) -> None:
    os.truncate(file, file.stat().st_size * tenth // 10)


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def files(folder: Path) -> list[Path]:
    newest = folder / "checkpoints" / str(STEPS[1])
    return sorted(path for path in newest.rglob("*") if path.is_file())


FOUND = (
    "detected and reported; training resumes from the previous checkpoint, and reading "
    "is an error"
)
HARMLESS = "the file is not needed: the arrays are bit-identical"


@pytest.mark.slow
def test_each_file_of_a_checkpoint_truncated_flipped_or_missing(whole, tmp_path, note):
    """Each file is truncated at each tenth, six of its bits flipped, and removed."""
    rng = random.Random(0)
    seen = set()
    for file in files(whole):
        cases: list[Any] = ["missing", *range(10), *["flip"] * 6]
        for case in cases:
            run = Path(shutil.copytree(whole, tmp_path / "run"))
            damaged = run / file.relative_to(whole)
            if case == "missing":
                damaged.unlink()
                fault = "a file of the newest checkpoint is missing"
            elif case == "flip":
                flip(damaged, rng)
                fault = "a bit of a file of the newest checkpoint is flipped"
            else:
                truncate(damaged, case)
                fault = "a file of the newest checkpoint is cut at each tenth"
            found = outcome(run)
            note(fault, FOUND if found == "found" else HARMLESS)
            seen.add((fault, found))
            shutil.rmtree(run)
    assert len(seen) == 6  # each fault is detected in some files


def _largest(folder: Path) -> Path:
    """File with the arrays."""
    return max(files(folder), key=lambda path: path.stat().st_size)


def _meta(folder: Path) -> Path:
    return folder / "checkpoints" / str(STEPS[1]) / "meta" / "metadata"


@pytest.mark.parametrize("which", [_largest, _meta])
@pytest.mark.parametrize("case", ["missing", "half", "flip"])
def test_damage_is_detected_by_content(copy, which, case):
    file = which(copy)
    if case == "missing":
        file.unlink()
    elif case == "half":
        truncate(file, 5)
    else:
        flip(file, random.Random(1))
    assert outcome(copy) == "found"


def test_an_empty_checkpoint_directory(copy, note):
    newest = copy / "checkpoints" / str(STEPS[1])
    shutil.rmtree(newest)
    newest.mkdir()
    assert outcome(copy) == "found"
    note("the newest checkpoint is an empty directory", FOUND)


def test_the_temporary_directory_of_a_killed_save_is_ignored(copy, note):
    left = copy / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / str(STEPS[1]), left)
    assert outcome(copy) == "harmless"
    with Checkpoints(copy / "checkpoints") as checkpoints:
        assert checkpoints.steps() == list(STEPS)
        checkpoints.save(9, state(9), {})
        checkpoints.wait()
        assert same(checkpoints.restore(9, state(0)), state(9))
    assert not left.exists()
    note("a killed save left its temporary directory", "ignored, then replaced")


def test_reading_gives_no_warning_and_writes_no_file(copy, caplog):
    before = sorted(copy.rglob("*"))
    with Checkpoints(copy / "checkpoints", writable=False) as checkpoints:
        checkpoints.verify(STEPS[1])
    assert not caplog.records
    assert sorted(copy.rglob("*")) == before


def test_if_all_checkpoints_are_damaged_no_file_is_changed(copy, note):
    for step in STEPS:
        for file in (copy / "checkpoints" / str(step)).rglob("*"):
            if file.is_file() and file.stat().st_size > 4096:
                truncate(file, 5)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with (
        Checkpoints(copy / "checkpoints") as checkpoints,
        pytest.raises(
            ValueError, match=r"every checkpoint in .* is damaged:\n"
        ) as caught,
    ):
        checkpoints.move_damaged(pytest.fail)
    for step in STEPS:
        assert f"checkpoint {copy / 'checkpoints' / str(step)} is damaged" in str(
            caught.value
        )
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    note("every checkpoint is damaged", "an error that lists them; no file is changed")


def test_an_array_of_zeros_is_detected(copy):
    """orbax reads a missing chunk as zeros without an error."""
    with Checkpoints(copy / "checkpoints", keep_latest=3) as checkpoints:
        zeros = jax.tree.map(np.zeros_like, state(7))
        checkpoints.save(8, zeros, {"class_names": []})
        checkpoints.wait()
    kept = _meta(copy).read_bytes()
    shutil.rmtree(copy / "checkpoints" / "7")
    (copy / "checkpoints" / "8").rename(copy / "checkpoints" / "7")
    _meta(copy).write_bytes(kept)
    assert outcome(copy) == "found"


def test_the_best_checkpoint_is_not_chosen_by_a_damaged_metric(copy):
    text = _meta(copy).read_text()
    assert '"metric": 0.7' in text
    _meta(copy).write_text(text.replace('"metric": 0.7', '"metric": 0.9'))
    with Checkpoints(copy / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.best_step() == STEPS[0]
        assert checkpoints.choose("best") == STEPS[0]


def test_a_checkpoint_without_checksums_is_read(copy):
    """The first version wrote no checksums, and the metric to its own file."""
    newest = copy / "checkpoints" / str(STEPS[1])
    _meta(copy).write_text('{"class_names": ["a", "b"]}')
    (newest / "metrics").mkdir()
    (newest / "metrics" / "metrics").write_text('{"best_metric": 0.95}')
    with Checkpoints(copy / "checkpoints") as checkpoints:
        assert checkpoints.move_damaged(pytest.fail) == STEPS[1]
        assert checkpoints.meta(STEPS[1]) == {"class_names": ["a", "b"]}
        assert checkpoints.best_step() == STEPS[1]
        assert same(checkpoints.restore(STEPS[1], state(0)), state(STEPS[1]))


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return tiny_run.save(folder), folder


@pytest.mark.parametrize("mode", [evaluate.run, export.run, restore.restore])
def test_a_damaged_checkpoint_is_not_evaluated_or_exported(
    run_of_two, tmp_path, mode, note
):
    config, folder = run_of_two
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    before = sorted(copy.rglob("*"))
    # All arrays are damaged, because evaluation reads some of them only.
    for file in (copy / "checkpoints" / "7" / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[::64] = bytes(x ^ 1 for x in content[::64])
        file.write_bytes(content)
    with pytest.raises(DamagedError, match=r"7 is damaged: .*eval.checkpoint=\[6\]"):
        mode(run_options.from_config(config), copy)
    assert sorted(copy.rglob("*")) == before  # no result, no export
    note(
        "a damaged checkpoint is evaluated, exported, restored",
        "an error that names the checkpoint",
    )
