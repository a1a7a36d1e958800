"""The lock, the config that a run directory belongs to, and the results per image."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cra_jax.runtime import run_directory

ROOT = Path(__file__).resolve().parents[2]


def test_a_second_process_is_refused_and_told_which_one(tmp_path):
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
    with run_directory.locked(tmp_path):  # a lock dies with its process
        pass


def test_the_same_config_goes_on_and_another_is_refused_with_the_difference(tmp_path):
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


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        run_directory.read_config(tmp_path)


def test_results_of_each_image_come_back_as_they_were(tmp_path):
    names = [
        "a.jpg",
        'with "quotes", and a comma.jpg',
        "Eissturmvögel/ß.png",
        "two\r\nlines.jpg",
    ]
    rows = [
        run_directory.Result(i, name, i, 2 - i, 1 / (i + 3), 18)
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
    assert header == "index,name,label,predicted,confidence,step"
    run_directory.write_results(tmp_path, "test", "center", rows[:1])
    assert len(run_directory.read_results(tmp_path, "test", "center")) == 1
    assert [x.name for x in file.parent.iterdir()] == ["test-center.csv"]
    with pytest.raises(ValueError, match=r"--mode eval .*eval.protocol=full"):
        run_directory.read_results(tmp_path, "test", "full")


def test_a_config_of_an_older_run_has_todays_keys_with_what_they_meant_then(tmp_path):
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
        "gradient_share": 1.0,
        "inner_scale": 0.0,
    }
    assert config["model"] == {"width": 8}  # a second pass was not asked for
    # A value that changed something stays, to be named.
    assert config["optim"] == {"attention_lr_scale": 0.1, "ema_decay": 0.0}
    # A run goes on where the keys that are gone had changed nothing.
    del old["optim"]["attention_lr_scale"], old["art"]["softness"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    run_directory.keep_config(tmp_path, {**old, "model": {"width": 8}})
