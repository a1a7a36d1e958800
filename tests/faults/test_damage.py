"""Checkpoints whose files were changed: the damage is found, or nothing has changed."""

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

# Reads of tensorstore's that were under way when another failed end after their loop.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

STEPS = (6, 7)


@pytest.fixture(autouse=True)
def left_behind():
    """What those reads leave is found here, and not in a test of another file."""
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
    """What reading and going on make of a run whose newest checkpoint was changed.

    Returns:
      "found": reading refuses it, and training goes on from the one before.
      "harmless": both give what was saved.
    """
    newest, before = STEPS[1], STEPS[0]
    try:
        with Checkpoints(folder / "checkpoints", writable=False) as checkpoints:
            if checkpoints.choose("latest") == newest:
                checkpoints.meta(newest)
                found = checkpoints.restore(newest, state(0))
                assert same(found, state(newest)), "a wrong array was read in silence"
                read = "harmless"
            else:
                read = "found"  # the folder itself is gone
    except DamagedError as error:
        read = "found" if f"/checkpoints/{newest} is damaged" in str(error) else ""
    told = []
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.move_damaged(told.append) or 0
        assert step == (newest if read == "harmless" else before)
        assert same(checkpoints.restore(step, state(0)), state(step))
        # The run goes on, and saves the step again.
        checkpoints.save(newest, state(newest), {}, metric=0.9)
        checkpoints.wait()
        assert same(checkpoints.restore(newest, state(0)), state(newest))
        assert checkpoints.best_step() == newest
    assert len(told) == (read == "found" and (folder / "damaged_checkpoints").exists())
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


FOUND = "found, said; training goes on from the checkpoint before, reading refuses"
HARMLESS = "holds nothing that is read: the arrays are the same, to the bit"


@pytest.mark.slow
def test_every_file_of_a_checkpoint_cut_short_or_changed(whole, tmp_path, note):
    """Every tenth of every file, six bits of each, and each file gone."""
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
    assert len(seen) == 6  # each fault is found in some files


def _largest(folder: Path) -> Path:
    """The file that holds the arrays."""
    return max(files(folder), key=lambda path: path.stat().st_size)


def _meta(folder: Path) -> Path:
    return folder / "checkpoints" / str(STEPS[1]) / "meta" / "metadata"


@pytest.mark.parametrize("which", [_largest, _meta])
@pytest.mark.parametrize("case", ["missing", "half", "flip"])
def test_damage_is_found_by_content(copy, which, case):
    file = which(copy)
    if case == "missing":
        file.unlink()
    elif case == "half":
        truncate(file, 5)
    else:
        flip(file, random.Random(1))
    assert outcome(copy) == "found"


def test_an_empty_folder_and_what_a_killed_save_left(copy, note):
    newest = copy / "checkpoints" / str(STEPS[1])
    shutil.rmtree(newest)
    newest.mkdir()
    assert outcome(copy) == "found"
    note("the newest checkpoint is an empty folder", FOUND)


def test_what_a_killed_save_left_is_no_checkpoint(copy, note):
    left = copy / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / str(STEPS[1]), left)
    assert outcome(copy) == "harmless"
    with Checkpoints(copy / "checkpoints") as checkpoints:
        assert checkpoints.steps() == list(STEPS)
        checkpoints.save(9, state(9), {})
        checkpoints.wait()
        assert same(checkpoints.restore(9, state(0)), state(9))
    assert not left.exists()
    note("a save that was killed left its temporary folder", "passed over, replaced")


def test_reading_alone_is_nothing_to_warn_of(copy, caplog):
    before = sorted(copy.rglob("*"))
    with Checkpoints(copy / "checkpoints", writable=False) as checkpoints:
        checkpoints.verify(STEPS[1])
    assert not caplog.records
    assert sorted(copy.rglob("*")) == before


def test_where_none_is_sound_nothing_is_changed(copy, note):
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
    note("every checkpoint is damaged", "an error that says so; no file is changed")


def test_an_array_that_became_zeros_is_found(copy):
    """A chunk that is missing reads as zeros: no error of orbax's would say so."""
    with Checkpoints(copy / "checkpoints", keep_latest=3) as checkpoints:
        zeros = jax.tree.map(np.zeros_like, state(7))
        checkpoints.save(8, zeros, {"class_names": []})
        checkpoints.wait()
    kept = _meta(copy).read_bytes()
    shutil.rmtree(copy / "checkpoints" / "7")
    (copy / "checkpoints" / "8").rename(copy / "checkpoints" / "7")
    _meta(copy).write_bytes(kept)
    assert outcome(copy) == "found"


def test_the_best_is_not_chosen_by_a_damaged_number(copy):
    text = _meta(copy).read_text()
    assert '"metric": 0.7' in text
    _meta(copy).write_text(text.replace('"metric": 0.7', '"metric": 0.9'))
    with Checkpoints(copy / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.best_step() == STEPS[0]
        assert checkpoints.choose("best") == STEPS[0]


def test_a_checkpoint_from_before_checksums_is_read(copy):
    """As the first runs wrote them: meta alone, and the metric in a file of its own."""
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
def test_no_number_comes_from_a_damaged_checkpoint(run_of_two, tmp_path, mode, note):
    config, folder = run_of_two
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    before = sorted(copy.rglob("*"))
    # Everywhere: what evaluation does not read, it does not have to find.
    for file in (copy / "checkpoints" / "7" / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[::64] = bytes(x ^ 1 for x in content[::64])
        file.write_bytes(content)
    with pytest.raises(DamagedError, match=r"7 is damaged: .*eval.checkpoint=\[6\]"):
        mode(run_options.from_config(config), copy)
    assert sorted(copy.rglob("*")) == before  # no result, no export
    note("a damaged checkpoint is evaluated, exported, restored", "refused by name")
