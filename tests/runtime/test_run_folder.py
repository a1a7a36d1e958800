"""The lock, the config that a folder belongs to, and the numbers of a resumed run."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cra_jax.runtime import run_folder, training_log

ROOT = Path(__file__).resolve().parents[2]


def test_a_second_process_is_refused_and_told_which_one(tmp_path):
    code = f"""
        from pathlib import Path
        from cra_jax.runtime import run_folder
        with run_folder.locked(Path({str(tmp_path)!r})):
            print("locked", flush=True)
            input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(ValueError, match=rf"in use by .*process {other.pid} on"),
            run_folder.locked(tmp_path),
        ):
            pass
        other.kill()
    with run_folder.locked(tmp_path):  # a lock dies with its process
        pass


def test_the_same_config_goes_on_and_another_is_refused_with_the_difference(tmp_path):
    config = {"seed": 0, "optim": {"base_lr": 1e-3, "steps": (1, 2)}}
    run_folder.keep_config(tmp_path, config)
    run_folder.keep_config(tmp_path, config)
    changed = {"seed": 0, "optim": {"base_lr": 1e-2, "steps": (1, 2)}}
    with pytest.raises(
        ValueError, match=r"optim.base_lr: 0.001 in the run folder, 0.01"
    ):
        run_folder.keep_config(tmp_path, changed)
    run_folder.keep_config(tmp_path, changed, allow_change=True)
    assert run_folder.read_config(tmp_path)["optim"]["base_lr"] == 1e-2


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        run_folder.read_config(tmp_path)


def test_a_resumed_log_drops_what_comes_after(tmp_path):
    numbers = {"loss": 1.0, "top1": 0.5, "images_per_second": 9.0, "eta_seconds": 75.0}
    with training_log.Log(tmp_path, first_step=0, total_steps=8) as log:
        for step in (2, 4, 6):
            log.train(step=step, epoch=1, numbers=numbers)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "epo')  # killed while it wrote
    with training_log.Log(tmp_path, first_step=4, total_steps=8) as log:
        log.train(step=6, epoch=1, numbers={**numbers, "loss": 2.0})
    lines = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert [(x["step"], x["loss"]) for x in lines] == [(2, 1.0), (4, 1.0), (6, 2.0)]
    assert all(x["split"] == "train" for x in lines)
    assert list((tmp_path / "tensorboard").iterdir())


def test_without_a_terminal_there_are_lines(tmp_path, capsys):
    numbers = {"loss": 1.0, "top1": 0.5, "images_per_second": 9.0, "eta_seconds": 3675}
    with training_log.Log(tmp_path, first_step=0, total_steps=8) as log:
        log.train(step=2, epoch=1, numbers=numbers)
    line = capsys.readouterr().err.strip()
    assert line == "step 2/8 epoch 1 loss 1.000 top1 0.500 images/s 9 ETA 1:01:15"


def test_results_of_each_picture_come_back_as_they_were(tmp_path):
    names = [
        "a.jpg",
        'with "quotes", and a comma.jpg',
        "Eissturmvögel/ß.png",
        "two\r\nlines.jpg",
    ]
    rows = [
        run_folder.Result(i, name, i, 2 - i, 1 / (i + 3), 18)
        for i, name in enumerate(names)
    ]
    run_folder.write_results(tmp_path, "test", "center", rows)
    found = run_folder.read_results(tmp_path, "test", "center")
    assert [x.confidence for x in found] == [0.333333, 0.25, 0.2, 0.166667]
    assert [x._replace(confidence=0) for x in found] == [
        x._replace(confidence=0) for x in rows
    ]
    file = tmp_path / "results" / "test-center.csv"
    header = file.read_text(encoding="utf-8").split("\n")[0]
    assert header == "index,name,label,predicted,confidence,step"
    run_folder.write_results(tmp_path, "test", "center", rows[:1])
    assert len(run_folder.read_results(tmp_path, "test", "center")) == 1
    assert [x.name for x in file.parent.iterdir()] == ["test-center.csv"]
    with pytest.raises(ValueError, match=r"--mode eval .*eval.protocol=full"):
        run_folder.read_results(tmp_path, "test", "full")


def _attended(log, step):
    log.attention(
        step=step,
        epoch=step // 2,
        split="test",
        names={5: "five", 9: "nine"},
        matrices={5: [[1, 0, step], [0, 1, 0]], 9: [[0.1234567, 0, 0], [0, 1, 0]]},
    )


def test_snapshots_of_a_resumed_run_are_neither_doubled_nor_lost(tmp_path):
    assert run_folder.read_snapshots(tmp_path) == []
    for _ in range(2):  # killed before the first checkpoint, it begins anew
        with training_log.Log(tmp_path, first_step=0, total_steps=8) as log:
            for step in (0, 2, 4, 6):
                _attended(log, step)
    with training_log.Log(tmp_path, first_step=4, total_steps=8) as log:
        _attended(log, 6)
    lines = run_folder.read_snapshots(tmp_path)
    places = [(x["step"], x["epoch"], x["index"], x["name"]) for x in lines]
    assert places == [
        (step, step // 2, *picture)
        for step in (0, 2, 4, 6)
        for picture in ((5, "five"), (9, "nine"))
    ]
    assert lines[2]["matrix"] == [[1, 0, 2], [0, 1, 0]]
    assert lines[1]["matrix"][0][0] == 0.123457
    assert {x["split"] for x in lines} == {"test"}


def test_a_run_without_attention_has_no_file_of_it(tmp_path):
    with training_log.Log(tmp_path, first_step=0, total_steps=8):
        pass
    assert not (tmp_path / run_folder.SNAPSHOTS).exists()
