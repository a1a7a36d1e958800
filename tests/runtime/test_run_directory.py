"""Run directory: its lock, its config, and the results of each image."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cra_jax.runtime import run_directory

ROOT = Path(__file__).resolve().parents[2]


def test_second_process_is_an_error_that_names_the_first(tmp_path):
    code = f"""
        from pathlib import Path
        from cra_jax.runtime import run_directory
        with run_directory.locked(Path({str(tmp_path)!r})):
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
            run_directory.locked(tmp_path),
        ):
            pass
        other.kill()
    with run_directory.locked(tmp_path):  # a killed process releases its lock
        pass


def test_other_config_is_an_error_that_names_the_difference(tmp_path):
    config = {"seed": 0, "optim": {"base_lr": 1e-3, "steps": (1, 2)}}
    run_directory.keep_config(tmp_path, config)
    run_directory.keep_config(tmp_path, config)
    changed = {"seed": 0, "optim": {"base_lr": 1e-2, "steps": (1, 2)}}
    with pytest.raises(
        ValueError, match=r"optim.base_lr: 0.001 in the run directory, 0.01"
    ):
        run_directory.keep_config(tmp_path, changed)
    run_directory.keep_config(tmp_path, changed, allow_change=True)
    assert run_directory.read_config(tmp_path)["optim"]["base_lr"] == 1e-2


def test_directory_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        run_directory.read_config(tmp_path)


def test_results_are_read_as_they_were_written(tmp_path):
    names = [
        "a.jpg",
        'with "quotes", and a comma.jpg',
        "Eissturmvögel/ß.png",
        "two\r\nlines.jpg",
    ]
    rows = [
        run_directory.Result(i, name, i, 2 - i, 1 / (i + 3), 18, f"{i}, a", "b")
        for i, name in enumerate(names)
    ]
    run_directory.write_results(tmp_path, "test", "center", rows)
    found = run_directory.read_results(tmp_path, "test", "center")
    assert [x.confidence for x in found] == [0.333333, 0.25, 0.2, 0.166667]
    assert [x._replace(confidence=0) for x in found] == [
        x._replace(confidence=0) for x in rows
    ]
    file = tmp_path / "results" / "test-center.csv"
    header = file.read_text(encoding="utf-8").split("\n")[0]
    assert header == (
        "index,name,label,predicted,confidence,step,class_name,predicted_class,"
        "digest,settings"
    )
    run_directory.write_results(tmp_path, "test", "center", rows[:1])
    assert len(run_directory.read_results(tmp_path, "test", "center")) == 1
    assert [x.name for x in file.parent.iterdir()] == ["test-center.csv"]
    file.write_text("index,name,label,predicted,confidence,step\n0,a.jpg,1,2,0.5,18\n")
    (older,) = run_directory.read_results(tmp_path, "test", "center")
    assert older == run_directory.Result(0, "a.jpg", 1, 2, 0.5, 18)
    with pytest.raises(ValueError, match=r"--mode eval .*eval.protocol=full"):
        run_directory.read_results(tmp_path, "test", "full")


def test_config_of_an_older_run_is_upgraded(tmp_path):
    old = {
        "seed": 3,
        "art": {"alpha_p": 0.9, "softness": 0.05},
        "model": {"ar_passes": 1, "width": 8},
        "optim": {"attention_lr_scale": 0.1},
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = run_directory.read_config(tmp_path)
    assert config["art"] == {
        "alpha_p": 0.9,
        "inside": False,
        "normalize_head": False,
        "rotate": True,
        "gradient_share": 1.0,
        "head": "pooled",
        "inner_scale": 0.0,
    }
    assert config["model"] == {  # ar_passes=1 had no effect
        "width": 8,
        "shared_weights": False,
    }
    # Removed keys whose value had an effect are kept, to be reported.
    assert config["optim"] == {"attention_lr_scale": 0.1, "ema_decay": 0.0}
    # The run can resume if the removed keys had no effect.
    del old["optim"]["attention_lr_scale"], old["art"]["softness"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    run_directory.keep_config(tmp_path, {**old, "model": {"width": 8}})
