"""Tests of the study: rows, results of runs, comparisons and the page."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from PIL import Image

from benchmarks.study import __main__, cars_subset, results, run
from benchmarks.study import rows as rows_module
from benchmarks.study.page import answer, draw, start_iou, text_of, write
from benchmarks.study.rows import (
    _ADDED_LATER,
    BY_NAME,
    GROUPS,
    ROWS,
    _phases,
    fingerprint,
    settings_of,
)
from cra_jax.datasets import sources, synthetic
from cra_jax.input import center_crop
from cra_jax.reports import uncertainty
from cra_jax.runtime import run_directory
from tests.helpers.fake_runs import make, write_start

ROOT = Path(__file__).resolve().parents[2]


def _line(row, seed, *, test=0.9, shifted=0.8, count=40, **more):
    """Line of a run whose first images are classified correctly."""

    def scores(top1):
        right = [i < round(top1 * count) for i in range(count)]
        return {
            **{"top1": top1, "count": count, "names": "abc", "pointing": 0.7},
            "right": results.to_hex(right),
        }

    settings = settings_of(BY_NAME[row], seed=seed)
    return {
        **{"row": row, "seed": seed, "commit": "aaaaaaa", "machine": "test"},
        **{"fingerprint": fingerprint(settings), "seconds": 60.0},
        **{"test": scores(test), "test_shifted": scores(shifted), "train": {}},
        **more,
    }


def test_rows_refer_to_earlier_rows_with_as_many_seeds():
    assert len(BY_NAME) == len(ROWS)
    assert {row.group for row in ROWS} == set(GROUPS)
    before: set[str] = set()
    for row in ROWS:
        # A difference is over seeds that both rows have.
        assert all(name in before for name in row.references), row.name
        assert all(BY_NAME[name].seeds >= row.seeds for name in row.references)
        assert row.question.endswith("?")
        before.add(row.name)


def test_rows_have_different_settings():
    prints = [(row.config, fingerprint(settings_of(row, seed=0))) for row in ROWS]
    assert len(set(prints)) == len(ROWS)


def test_baselines_with_the_same_compute_have_longer_schedules():
    for row in ROWS:
        if row.name.endswith("baseline-long"):
            usual = BY_NAME[row.references[0]].changes
            for key in _phases(0, 0, 0):
                assert row.changes[key] == 1.5 * usual[key], (row.name, key)


def test_fingerprints_depend_on_relevant_settings_only():
    row = BY_NAME["cra"]
    settings = settings_of(row, seed=0)
    usual = fingerprint(settings)
    for key, value in (
        *(("seed", 5), ("data.path", "/elsewhere"), ("eval.every_epochs", 7)),
        *(("checkpoint.keep_latest", 9), ("hosts.count", 2), ("train.report", True)),
    ):
        assert key in settings
        assert fingerprint({**settings, key: value}) == usual, key
    for key, value in (
        *(("art.guard", 0.5), ("optim.base_lr", 1.0), ("data.seed", 1)),
        *(("loss.cntr", 0.0), ("train.epochs", 1), ("model.width", 8)),
    ):
        assert key in settings
        assert fingerprint({**settings, key: value}) != usual, key


def test_fingerprints_of_baselines_ignore_settings_of_the_attention():
    settings = settings_of(BY_NAME["baseline"], seed=0)
    usual = fingerprint(settings)
    changed = {**settings, "art.guard": 0.1, "contrast.margin": 9.0}
    assert fingerprint(changed) == usual
    assert fingerprint({**settings, "optim.momentum": 0.1}) != usual


def test_a_setting_added_later_keeps_older_fingerprints(monkeypatch):
    settings = settings_of(BY_NAME["cra"], seed=0)
    usual = fingerprint(settings)
    later = {**settings, "art.new": "as before"}
    assert fingerprint(later) != usual
    known = {**_ADDED_LATER, "art.new": "as before"}
    monkeypatch.setattr(rows_module, "_ADDED_LATER", known)
    assert fingerprint(later) == usual
    assert fingerprint({**settings, "art.new": "otherwise"}) != usual


def test_seeds_are_interleaved_within_groups(tmp_path):
    rows = [BY_NAME[x] for x in ("no-res", "baseline", "cra")]
    jobs = run.jobs_in_order(rows, seeds=None, root=tmp_path, paths={})
    order = [(job.row.name, job.seed) for job in jobs]
    assert order[:4] == [("baseline", 0), ("cra", 0), ("baseline", 1), ("cra", 1)]
    assert order[-3:] == [("no-res", 0), ("no-res", 1), ("no-res", 2)]
    assert len(order) == 13


def test_hexadecimal_digits_decode_to_the_same_values():
    rng = np.random.default_rng(0)
    for count in (1, 3, 4, 5, 145):
        right = rng.random(count) < 0.5
        digits = results.to_hex(right.tolist())
        assert len(digits) == -(-count // 4)
        np.testing.assert_array_equal(results.from_hex(digits, count), right)
    assert results.to_hex([True, False, False, False, True]) == "88"


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3, 4, 5], 2 / 32),
        ([-1, -2, -3], 2 / 8),
        ([1, -1], 1.0),
        ([0, 0, 0], 1.0),
        ([3, 1, -1], 6 / 8),  # all signs except those with a sum of 1 or -1
        ([0.7], 1.0),
    ],
)
def test_the_sign_flip_p_value_equals_a_count_of_all_signs(differences, p):
    extreme = []
    for number in range(2 ** len(differences)):
        signs = [1 - 2 * (number >> i & 1) for i in range(len(differences))]
        total = sum(s * d for s, d in zip(signs, differences, strict=True))
        extreme.append(abs(total) >= abs(sum(differences)) - 1e-12)
    assert np.mean(extreme) == p
    assert results.sign_flip(differences) == p


def test_differences_are_paired_by_seed():
    lines = [
        *(_line("baseline", seed, shifted=s) for seed, s in ((0, 0.5), (2, 0.7))),
        *(_line("cra", seed, shifted=s) for seed, s in ((2, 0.8), (0, 0.7), (1, 0.1))),
    ]
    found, others = results.collect(lines)
    assert not others
    key = ("test_shifted", "top1")
    one = results.difference(found, "cra", "baseline", key)
    assert one is not None
    assert one.spread.mean == pytest.approx((0.2 + 0.1) / 2)
    assert one.spread.count == 2
    assert one.p == 0.5
    # Of 80 images, only CRA-CNN classifies 8 + 4 correctly, only the baseline none.
    assert one.images == uncertainty.Paired(48, 0, 12, 20, 2 / 2**12)
    assert results.difference(found, "stn", "baseline", key) is None


def test_different_images_are_not_paired():
    other = _line("cra", 0)
    other["test"]["names"] = "xyz"
    found, _ = results.collect([_line("baseline", 0), other])
    one = results.difference(found, "cra", "baseline", ("test", "top1"))
    assert one is not None
    assert one.images is None


def test_results_of_other_settings_are_listed_and_not_counted(tmp_path):
    removed = {**_line("cra", 0), "row": "removed"}
    old = {**_line("cra", 1), "fingerprint": "0" * 12}
    found, others = results.collect([_line("cra", 0), old, removed])
    assert list(found["cra"]) == [0]
    assert others == [old, removed]
    write([_line("cra", 0), old, removed], tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "2 results have other settings" in text
    assert "cra, removed" in text


@pytest.mark.parametrize(
    ("changes", "cells"),
    [
        ((0.10, 0.11, 0.09, 0.10, 0.10), ("+10.0 (+9.1 to +10.9)", "0.062", "higher")),
        ((-0.1, -0.11, -0.09, -0.1, -0.1), ("−10.0 (−10.9 to −9.1)", "0.062", "lower")),
        ((0.1, -0.11, 0.09, -0.1, 0.1), ("+1.6 (−12.1 to +15.3)", "1.000", "no diff")),
        ((0.10, 0.11), ("+10.5", "–", "too few seeds")),
    ],
)
def test_the_page_claims_a_difference_if_the_interval_excludes_0(
    tmp_path, changes, cells
):
    lines = []
    for seed, change in enumerate(changes):
        lines.append(_line("baseline-long", seed, shifted=0.7))
        lines.append(_line("cra", seed, shifted=0.7 + change))
    text = text_of(lines)
    (row,) = [x for x in text.splitlines() if x.startswith("| top-1, `test_shifted`")]
    found = [cell.strip() for cell in row.strip("|").split("|")]
    assert found[1:3] == ["baseline, same compute", str(len(changes))]
    assert found[4] == "70.0 ± 0.0"
    assert found[5:7] == list(cells[:2])
    assert found[7].startswith(cells[2])


@pytest.mark.parametrize(
    ("moved", "words"),
    [
        (0.01, "The attention does not move onto the bird. "),
        (0.3, "The attention moves onto the bird. "),
        (-0.2, "The attention moves away from the bird. "),
        (None, "No movement is shown. "),
    ],
)
def test_a_small_change_of_the_iou_counts_as_no_movement(moved, words):
    start = start_iou(settings_of(BY_NAME["cra"], seed=0))
    lines = []
    for seed, noise in enumerate((-0.001, 0.0, 0.001)):
        lines.append(_line("cra", seed))
        change = moved + noise if moved is not None else 200 * noise
        lines[-1]["test"]["attention_iou"] = start + change
    text = "\n".join(answer(results.collect(lines)[0]))
    assert words in text
    assert f"{start:.2f} before training" in text


def _photographs():
    """Lines of one dataset: CRA-CNN is higher than one baseline and lower than one."""
    scores = (("cra", 0.7), ("baseline", 0.6), ("baseline-long", 0.8))
    return [
        _line(f"cars-tuned-{name}", seed, test=top1 + noise * (name == "cra"))
        for seed, noise in enumerate((-0.01, 0.0, 0.01))
        for name, top1 in scores
    ]


def test_photographs_are_compared_with_both_baselines():
    text = text_of(_photographs())
    (row,) = [x for x in text.splitlines() if x.startswith("| 16 models")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["fine-tuned", "3", "70.0 ± 1.0"]
    assert cells[4] == "+10.0 (+7.5 to +12.5)"
    assert cells[5] == "−10.0 (−12.5 to −7.5)"


def test_the_summary_counts_differences_and_names_them():
    text = text_of(_photographs())
    assert "same compute in 0 of 1 comparisons, and less accurate in 1." in text
    where = "16 models of Stanford Cars, fine-tuned"
    assert f"is higher in 1 ({where}: +10.0) and lower in 0 of 1 comparisons" in text
    assert f"is higher in 0 and lower in 1 ({where}: −10.0) of 1 comparisons" in text


def test_changes_are_compared_with_the_row_that_they_change():
    lines = [
        _line(name, seed, shifted=top1 + 0.01 * seed)
        for seed in range(3)
        for name, top1 in (("cra", 0.5), ("baseline", 0.9), ("no-res", 0.6))
    ]
    assert "Higher: without L_res (+10.0). Lower: none." in text_of(lines)


def test_extensions_are_compared_with_the_same_training_without_them(tmp_path):
    lines = [
        _line(row, seed, test=top1 + seed / 40, shifted=top1)
        for seed in range(3)
        for row, top1 in (
            ("gain-baseline-plus", 0.8),
            ("gain-plus", 0.9),
            ("gain-baseline-plus-80-64", 0.7),
            ("gain-plus-80-64", 0.6),
        )
    ]
    text = text_of(lines)
    assert (
        "90.0 ± 0.0 % on `test_shifted`, against 80.0 ± 0.0 % (higher, 3 seeds)" in text
    )
    row = next(x for x in text.splitlines() if x.startswith("| all extensions, smoo"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["3", "1.0", "92.5 ± 2.5"]
    assert cells[4].startswith("+10.0 (")
    assert "baseline with more and less compute" in text
    write(lines, tmp_path)
    for name in ("gain", "curves", "budget"):
        image = matplotlib.image.imread(tmp_path / "study" / f"{name}.png")
        assert np.ptp(image) > 0


def test_every_row_with_few_images_takes_the_same_passes():
    baseline = BY_NAME["gain-baseline"].changes["train.epochs"]
    for row in ROWS:
        if row.group == "gain":
            each = {"baseline": 1, "cra": 1.5}[row.kind]
            settings = settings_of(row, seed=0)
            each += 0.5 * (settings["swap.weight"] > 0)
            each += (settings["mix.kind"] == "snapmix") / 3  # a forward pass
            assert settings["train.epochs"] == round(baseline / each), row.name


def test_the_page_in_the_repository_is_written_from_its_results():
    """If it fails: python -m benchmarks.study --table."""
    docs = ROOT / "docs"
    page = (docs / "study.md").read_text()
    assert page == text_of(results.Lines(docs / "study" / "results.jsonl"))


@pytest.mark.parametrize(
    ("file", "least"),
    [("docs/findings.md", 20), ("docs/index.md", 5), ("README.md", 7)],
)
def test_the_numbers_in_words_are_those_of_the_page(file, least):
    page = (ROOT / "docs" / "study.md").read_text()
    found = re.findall(r"\d+\.\d ± \d+\.\d", (ROOT / file).read_text())
    assert len(found) >= least
    assert [one for one in found if one not in page] == []


def test_a_page_without_runs_has_no_results(tmp_path):
    write([], tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert text.count("No runs.") == 2
    assert "**Result.**" not in text
    assert "higher in" not in text
    assert not list(tmp_path.glob("*.png"))
    for group in GROUPS.values():
        assert f"### {group}" in text
    total = sum(row.seeds for row in ROWS)
    assert f"{total} of {total} planned runs are missing" in text


def test_tables_and_figures_have_the_results(tmp_path):
    lines = []
    for seed, shifted in enumerate((0.80, 0.84, 0.88)):
        lines.append(_line("baseline", seed, test=0.9, shifted=shifted - 0.1))
        lines.append(_line("cra", seed, test=0.9, shifted=shifted, leak_noise=0.25))
    write(lines, tmp_path)
    text = (tmp_path / "study.md").read_text()
    cells = [[x.strip() for x in row.split("|")[1:-1]] for row in text.splitlines()]
    rows = {row[0]: row for row in cells if len(row) == 7}
    assert rows["baseline"][1:5] == ["3", "90.0 ± 0.0", "74.0 ± 4.0", "16.0 ± 4.0"]
    (row,) = [r for r in cells if r[:2] == ["CRA-CNN", "baseline"]]
    assert row[2:4] == ["3", "+0.0 (+0.0 to +0.0)"]
    assert row[5] == "+10.0 (+10.0 to +10.0)"
    assert row[6] == "0.250"
    assert row[7] == "12 : 0 (< 0.001)"
    (leaks,) = [r for r in cells if r[:1] == ["CRA-CNN"] and len(r) == 2]
    assert leaks[1] == "25.0 ± 0.0"
    assert "19 of 25 runs are missing" in text
    image = matplotlib.image.imread(tmp_path / "study" / "main.png")
    assert image.shape[1] > 800
    assert image[..., :3].std() > 0.05
    again = (tmp_path / "study" / "main.png").read_bytes()
    write(lines, tmp_path)
    assert (tmp_path / "study" / "main.png").read_bytes() == again


def test_figures_have_a_marker_for_each_run():
    lines = [_line("cra", seed, shifted=0.8) for seed in range(4)]
    lines += [_line("baseline", seed) for seed in range(2)]
    found, _ = results.collect(lines)
    figure = draw([BY_NAME["baseline"], BY_NAME["cra"]], found)
    assert len(figure.axes) == 3  # no row has an IoU
    for ax in figure.axes:
        markers = [line.get_xdata() for line in ax.lines if line.get_marker() != "None"]
        assert [len(x) for x in markers] == [2, 4]  # pyright: ignore[reportArgumentType]
    assert [x.get_text() for x in figure.axes[0].get_yticklabels()] == [
        *("baseline", "CRA-CNN"),
    ]


def test_the_initial_iou_equals_one_counted_on_a_raster():
    settings = settings_of(BY_NAME["cra"], seed=0)
    settings |= {"data.test_size": 4, "art.init": (0.2, -0.1, 0.4, 0.5)}
    side = settings["data.crop_px"]
    fine = (np.arange(side * 16) + 0.5) / 16 - 0.5
    x, y = np.meshgrid(fine, fine)
    u, v = (2 * x / (side - 1) - 1 - 0.2), (2 * y / (side - 1) - 1 + 0.1)
    c, s = np.cos(0.5), np.sin(0.5)
    attended = (abs(c * u + s * v) <= 0.4) & (abs(-s * u + c * v) <= 0.4)
    ious = []
    for index in range(4):
        box = synthetic.draw("test", index).box
        x0, y0, x1, y1 = center_crop.box_in_crop_px(box, (72, 72), side)
        inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        ious.append((attended & inside).sum() / (attended | inside).sum())
    assert start_iou(settings) == pytest.approx(np.mean(ious), abs=3e-3)


def _finished(root, *, row="baseline", seed=0):
    """Writes a finished run directory of a row, and returns its job."""
    job = run.job_of(BY_NAME[row], seed, root)
    changes = settings_of(BY_NAME[row], seed=seed)
    make(job.workdir, right=7, seed=seed, changes=changes)
    write_start(job.workdir, outcome="stopped", versions={"jax": "0.0.1"})
    # `make` writes scores of epoch 2; this run has more epochs.
    metrics = job.workdir / run_directory.METRICS
    text = metrics.read_text()
    metrics.write_text(
        text.replace('"epoch": 2', f'"epoch": {changes["train.epochs"]}')
    )
    (job.workdir / "checkpoints" / "20").mkdir(parents=True)
    return job


def test_a_line_has_the_results_of_the_run_directory(tmp_path):
    job = _finished(tmp_path, seed=3)
    line = run.line_of(job)
    assert (line["row"], line["seed"]) == ("baseline", 3)
    assert line["fingerprint"] == job.fingerprint
    assert line["commit"] == "a" * 7
    assert line["jax"] == "0.0.1"
    # 20 steps at 64 images per second.
    batch = settings_of(BY_NAME["baseline"], seed=0)["train.batch_size"]
    assert line["seconds"] == pytest.approx(20 * batch / 64, abs=0.05)
    assert line["test"]["top1"] == 0.7
    answers = results.from_hex(line["test"]["right"], 10)
    assert answers.tolist() == [True] * 7 + [False] * 3
    assert line == json.loads(json.dumps(line))


def test_unfinished_runs_and_other_settings_are_refused(tmp_path):
    job = _finished(tmp_path)
    config = run_directory.read_config(job.workdir)
    config["optim"]["base_lr"] = 1.0
    run_directory.keep_config(job.workdir, config, allow_change=True)
    with pytest.raises(ValueError, match="trained with other settings"):
        run.line_of(job)
    unscored, unsaved = (_finished(tmp_path, seed=seed) for seed in (1, 2))
    metrics = unscored.workdir / run_directory.METRICS
    metrics.write_text(metrics.read_text().replace('"epoch": ', '"epoch": 1'))
    (unsaved.workdir / "checkpoints" / "20").rmdir()
    for other in (unscored, unsaved):
        with pytest.raises(
            ValueError, match="not finished: run the same command again"
        ):
            run.line_of(other)


def test_lines_are_sorted_and_replaced(tmp_path):
    path = tmp_path / "docs" / "study" / "results.jsonl"
    lines = results.Lines(path)
    for row, seed in (("cra", 1), ("baseline", 1), ("cra", 0)):
        lines.put(_line(row, seed))
    lines.put(_line("cra", 0, shifted=0.5))
    again = results.Lines(path)
    assert [(x["row"], x["seed"]) for x in again] == [
        *(("baseline", 1), ("cra", 0), ("cra", 1)),
    ]
    job = run.job_of(BY_NAME["cra"], 0, tmp_path)
    kept = again.get(job.key)
    assert kept is not None
    assert kept["test_shifted"]["top1"] == 0.5
    assert again.get(("cra", 0, "0" * 12)) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"row": "cra"}'])
def test_a_damaged_line_is_named(tmp_path, text):
    path = tmp_path / "study" / "results.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(_line("cra", 0)) + f"\n{text}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2, is not a result"):
        results.Lines(path)


def _fake(job, code):
    return job._replace(command=[sys.executable, "-c", code])


def test_failed_runs_are_repeated_and_finished_ones_are_not(tmp_path, capsys):
    made = _finished(tmp_path / "made")
    job = run.job_of(BY_NAME["baseline"], 0, tmp_path / "runs")
    count = tmp_path / "count"
    ran = f"open({str(count)!r}, 'a').write('x')\n"
    fails = _fake(job, f"{ran}raise SystemExit(3)")
    works = _fake(
        job,
        f"{ran}import shutil\n"
        f"shutil.copytree({str(made.workdir)!r}, {str(job.workdir)!r}, "
        "dirs_exist_ok=True)",
    )
    lines = results.Lines(tmp_path / "study" / "results.jsonl")
    runner = run.Runner(lines, threads=1)
    assert runner.run([fails], parallel=2) == [job.workdir.name]
    assert "ended with status 3" in capsys.readouterr().out
    assert not list(lines)
    assert run.Runner(lines, threads=1).run([works], parallel=2) == []
    (line,) = results.Lines(tmp_path / "study" / "results.jsonl")
    assert line == run.line_of(job)
    assert run.Runner(lines, threads=1).run([fails], parallel=2) == []
    assert count.read_text() == "xx"


def test_the_class_leak_is_added_once(tmp_path, monkeypatch):
    code = "import json; print('a message'); print(json.dumps({'top1': 0.5}))"
    monkeypatch.setattr(run, "_MEASURE", code)
    job = _finished(tmp_path, row="cra")
    plain = _finished(tmp_path, row="baseline")
    lines = results.Lines(tmp_path / "study" / "results.jsonl")
    later = run.Runner(lines, threads=1, leak=False)
    assert later.run([job, plain], parallel=1) == []
    assert not any("leak_top1" in line for line in lines)
    assert run.Runner(lines, threads=1).run([job, plain], parallel=1) == []
    scores = {line["row"]: line.get("leak_top1") for line in lines}
    assert scores == {"cra": 0.5, "baseline": None}
    monkeypatch.setattr(run, "_MEASURE", "raise SystemExit(1)")
    assert run.Runner(lines, threads=1).run([job], parallel=1) == []
    kept = lines.get(job.key)
    assert kept is not None
    assert kept["leak_top1"] == 0.5


def test_half_of_the_images_of_the_first_models_are_for_testing(tmp_path):
    """The list has boxes in pixels."""
    boxes = []
    for i in range(9):
        split, model = ("train", "test")[i == 8], f"Car {'CAB'[i % 3]}"
        file = tmp_path / "cars" / "car_data" / split / model / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + i, 30)).save(file)
        boxes.append((split, f"{i}.jpg", 3, 2, 30 + i, 20, "BCA".index(model[-1]) + 1))
    for split in ("train", "test"):
        rows = [",".join(map(str, box[1:])) for box in boxes if box[0] == split]
        (tmp_path / "cars" / f"anno_{split}.csv").write_text("\n".join(rows) + "\n")
    file = cars_subset.file_in(tmp_path / "runs")
    cars_subset.write(tmp_path / "cars", file, models=2)
    cars_subset.write(tmp_path / "cars", file, models=2)  # and again
    data = sources.load("csv", file)
    assert data.class_names == ("Car A", "Car B")
    chosen = {
        split: [(Path(r.name).name, r.label) for r in records]
        for split, records in data.splits.items()
    }
    # Of A: 1, 4, 7; of B: 8 (from test), 2, 5, by their names.
    assert chosen == {
        "train": [("1.jpg", 0), ("7.jpg", 0), ("8.jpg", 1), ("5.jpg", 1)],
        "test": [("4.jpg", 0), ("2.jpg", 1)],
    }
    assert data.splits["train"][0].box == pytest.approx(
        (2 / 41, 1 / 30, 31 / 41, 2 / 3)
    )
    with pytest.raises(ValueError, match="3 models, and the study takes 16"):
        cars_subset.write(tmp_path / "cars", file)


def test_a_dry_run_lists_the_missing_runs_and_writes_nothing(tmp_path, capsys):
    docs = tmp_path / "docs"
    results.Lines(docs / "study" / "results.jsonl").put(_line("cra", 0))
    before = sorted(tmp_path.rglob("*"))
    flags = [f"--docs={docs}", f"--root={tmp_path / 'runs'}", "--dry_run"]
    assert __main__.main([*flags, "--only", "cra", "cub-tuned-cra"]) == 0
    out = capsys.readouterr().out
    assert "rows on cub are skipped: --cub DIR runs them" in out
    assert "4 of 5 runs are missing" in out
    assert sorted(tmp_path.rglob("*")) == before


def _run(command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


def test_commands_give_the_settings_of_their_rows(tmp_path):
    """As launch.py reads them: strings, numbers, booleans and an empty string."""
    code = (
        "import json, sys; from absl import app, flags; import launch\n"
        "from cra_jax.runtime import run_directory\n"
        "def main(_):\n"
        "  config = flags.FLAGS.config\n"
        "  print(json.dumps(run_directory.flatten(config.to_dict())))\n"
        "app.run(main, flags_parser=launch.parse_flags)"
    )
    row = BY_NAME["cub-scratch-cra-soft"]
    assert {type(x) for x in row.changes.values()} == {int, float, str}
    job = run.job_of(row, 2, tmp_path, str(tmp_path))
    settings = json.loads(_run([sys.executable, "-c", code, *job.command[2:]]).stdout)
    assert fingerprint(settings) == job.fingerprint
    assert settings["model.pretrained"] == ""
    assert settings["seed"] == 2
    assert settings["data.path"] == str(tmp_path)


@pytest.mark.slow
def test_a_killed_study_resumes_and_a_finished_run_is_not_repeated(tmp_path):
    """A small row is killed after its first checkpoint, resumed, and run again."""
    code = (
        "import sys; from benchmarks.study import __main__, results, rows, run\n"
        "tiny = {'data.short_side_px': 36, 'data.crop_px': 32, 'data.train_size': 96,"
        " 'data.test_size': 40, 'model.width': 8, 'art.size_px': 16,"
        " 'train.batch_size': 16, 'train.epochs': 8, 'checkpoint.every_epochs': 1,"
        f" 'data.cache_dir': {str(tmp_path / 'cache')!r}}}\n"
        "row = rows.BY_NAME['cra']\n"
        "row = row._replace(changes={**row.changes, **tiny}, seeds=1, references=())\n"
        "for module in (__main__, run, results):\n"
        "  module.BY_NAME = {'cra': row, 'baseline': rows.BY_NAME['baseline']}\n"
        "sys.exit(__main__.main(sys.argv[1:]))"
    )
    docs, root = tmp_path / "docs", tmp_path / "runs"
    command = [sys.executable, "-c", code, "--only", "cra", "--seeds", "0"]
    command += [f"--docs={docs}", f"--root={root}", "--jobs", "1"]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not any(x.name.isdecimal() for x in root.glob("*/checkpoints/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (docs / "study" / "results.jsonl").exists()

    again = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    (workdir,) = root.glob("cra-seed0-*")
    assert "resumes from step" in (workdir / "study.log").read_text()
    assert "cra-seed0" in again.stdout
    lines = (docs / "study" / "results.jsonl").read_text()
    assert json.loads(lines)["test"]["count"] == 40

    third = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "launch.py" not in third.stdout
    assert (docs / "study" / "results.jsonl").read_text() == lines
