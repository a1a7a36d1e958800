"""Tests of the cells of the paper's tables: commands, table and interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import reproduce
from tests.helpers.fake_runs import make

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    f"--config.{setting}"
    for setting in (
        *("data.source=synthetic", "data.short_side_px=36", "data.crop_px=32"),
        *("data.train_size=96", "data.test_size=40", "model.backbone=resnet10"),
        *("model.pretrained=", "model.width=8", "model.stem=small"),
        *("art.size_px=16", "train.batch_size=16", "train.epochs=3"),
        *("eval.batch_size=16", "eval.snapshots=2", "optim.first_epochs=1"),
    )
]


def test_the_cells_are_table_1():
    assert [cell.name for cell in reproduce.CELLS] == [
        f"{data}-{backbone}-{kind}"
        for data in ("cub", "cars")
        for backbone in ("resnet50", "resnet101")
        for kind in ("baseline", "cra")
    ]


def test_commands_have_the_config_of_the_cell(tmp_path):
    for cell in reproduce.CELLS:
        train, score, report = reproduce.commands(
            cell, tmp_path / cell.name, seed=3, path="/data", settings=["--config.x=1"]
        )
        (config,) = [x for x in train if x.startswith("--config=")]
        file, _, variant = config.removeprefix("--config=").partition(":")
        assert Path(file).is_file()
        module = __import__(f"configs.{Path(file).stem}", fromlist=["get_config"])
        settings = module.get_config(variant)
        assert settings.data.source == cell.data
        assert (settings.model.backbone, settings.model.kind) == cell[1:]
        assert settings.train.epochs == reproduce.EPOCHS
        assert "--config.seed=3" in train
        assert "--config.data.path=/data" in train
        assert train[-1] == "--config.x=1"
        assert "--mode=eval" in score
        assert "--mode=report" in report
        assert all(f"--workdir={tmp_path / cell.name}" in c for c in (train, score))


def test_flop_of_a_cell():
    cell = reproduce.Cell("cub", "resnet101", "cra")
    assert cell.flop == 281e9 * 5994 * 140
    baseline = reproduce.Cell("cub", "resnet101", "baseline")
    assert baseline.flop * 1.5 == pytest.approx(cell.flop)


def _finish(workdir):
    (workdir / "reproduced.json").write_text("[]")


def test_the_table_has_finished_runs_only(tmp_path):
    whole: dict = {"labels": (0, 1) * 2897, "changes": {"train.epochs": 140}}
    for seed, right in ((0, 4900), (1, 5000)):
        make(tmp_path / f"cub-resnet50-cra-seed{seed}", right=right, seed=seed, **whole)
        _finish(tmp_path / f"cub-resnet50-cra-seed{seed}")
    make(tmp_path / "cub-resnet50-baseline-seed0", right=5000, **whole)
    make(tmp_path / "cub-resnet101-cra-seed0", variant="resnet101")
    _finish(tmp_path / "cub-resnet101-cra-seed0")
    text = reproduce.table(tmp_path, (0, 1), tflops=20)
    rows = [[c.strip() for c in x.split("|")[1:-1]] for x in text.splitlines()]
    cells = {tuple(row[:5]): row[5:8] for row in rows if len(row) == 9}
    ours = {
        ("Table 1", "CUB-200-2011", "resnet50", "CRA-CNN", "center"): [
            *("86.2", "85.4 ± 1.2", "2"),
        ],
        ("Table 1", "CUB-200-2011", "resnet50", "baseline", "center"): [
            *("84.2", "not finished", "0"),
        ],
        ("Table 1", "Stanford Cars", "resnet50", "baseline", "center"): [
            *("90.0", "not run", "0"),
        ],
        ("Table 1", "CUB-200-2011", "resnet101", "CRA-CNN", "center"): [
            *("87.6", "70.0 *", "1"),
        ],
    }
    assert {key: cells[key] for key in ours} == ours
    assert "* cub-resnet101-cra-seed0: 10 test images of cub, 2 epochs" in text
    assert "an estimate, not a measurement" in text


def test_a_dry_run_lists_commands_and_writes_nothing(tmp_path, capsys):
    root = tmp_path / "runs"
    only = ["--only", "cars-resnet50-cra", "--seeds", "0", "1"]
    assert reproduce.main(["--dry_run", f"--root={root}", *only]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if "launch.py" in x]
    assert len(lines) == 6
    assert not root.exists()


def test_cars_without_a_path_are_skipped_with_a_message(tmp_path, capsys):
    only = ["--only", "cars-resnet50-cra"]
    assert reproduce.main([f"--root={tmp_path}", *only]) == 1
    assert "cars-resnet50-cra-seed0: skipped" in capsys.readouterr().out


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--dry_run", "--config.train.epochs", "3"])
    assert "is not a flag" in capsys.readouterr().err


def test_a_failed_cell_is_repeated(tmp_path):
    workdir = tmp_path / "cell"
    workdir.mkdir()
    touch = [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"]
    fail = [sys.executable, "-c", "raise SystemExit(1)"]
    assert not reproduce.run_cell(workdir, [touch, fail])
    assert not (workdir / "reproduced.json").exists()
    assert reproduce.run_cell(workdir, [touch, touch])
    assert reproduce.run_cell(workdir, [touch, touch])  # finished, so nothing runs
    assert (tmp_path / "ran").read_text() == "xxx"
    assert reproduce.run_cell(workdir, [touch])  # other commands are another cell
    assert (tmp_path / "ran").read_text() == "xxxx"


@pytest.mark.slow
def test_a_killed_cell_resumes_and_a_finished_one_is_skipped(tmp_path):
    root, cell = tmp_path / "runs", "cub-resnet50-cra"
    command = [sys.executable, "-m", "benchmarks.reproduce", "--only", cell]
    command += [f"--root={root}", *TINY, f"--config.data.cache_dir={tmp_path / 'c'}"]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "XLA_FLAGS": "",
    }
    workdir = root / f"{cell}-seed0"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # Killed after a checkpoint of the first epoch, from which it resumes.
    deadline = time.monotonic() + 300
    while not any(x.name.isdecimal() for x in workdir.glob("checkpoints/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (workdir / "reproduced.json").exists()

    again = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "resumes from step" in again.stderr
    assert "Table 2 | CUB-200-2011  | resnet50  | CRA-CNN" in again.stdout
    starts = json.loads((workdir / "provenance.json").read_text())["starts"]
    assert [start["outcome"] for start in starts] == [None, "finished"]
    assert starts[1]["first_step"] in (6, 12)

    third = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert f"{workdir.name}: finished before" in third.stdout
    assert "launch.py" not in third.stdout
    assert third.stdout.split("| table")[1:] == again.stdout.split("| table")[1:]
