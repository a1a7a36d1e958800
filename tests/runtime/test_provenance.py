"""The record of each start of a run."""

import json
import subprocess
import sys

import pytest

from cra_jax.runtime import provenance


def _start(workdir, first_step=0):
    return provenance.recorded(workdir, devices="2 x test", first_step=first_step)


def test_each_start_is_recorded_with_its_outcome(tmp_path):
    def interrupted():
        with _start(tmp_path):
            (running,) = provenance.read(tmp_path)
            assert running["ended"] is None  # stays None if the process is killed
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with _start(tmp_path, first_step=4):
        pass
    first, second = provenance.read(tmp_path)
    assert first["outcome"] == "stopped by KeyboardInterrupt"
    assert (second["outcome"], second["first_step"]) == ("finished", 4)
    assert first["started"] <= first["ended"] <= second["started"] <= second["ended"]
    assert second["devices"] == "2 x test"
    assert second["versions"]["jax"] == pytest.importorskip("jax").__version__
    assert second["versions"]["python"] == sys.version.split()[0]
    assert json.loads((tmp_path / "provenance.json").read_text())["starts"][1] == second


def _git(folder, *arguments):
    names = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", *names, *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_commit_and_changed_files_are_recorded(tmp_path, monkeypatch):
    package = tmp_path / "cra_jax"
    package.mkdir()
    (package / "provenance.py").write_text("")
    (package / "train.py").write_text("1")
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert provenance.describe_code() == {}  # no repository
    assert provenance.describe_commit({}) == "unknown"
    _git(tmp_path, "init", "--quiet")
    (tmp_path / "notes.txt").write_text("another project")
    _git(tmp_path, "add", "notes.txt")
    _git(tmp_path, "commit", "--quiet", "-m", "x")
    assert provenance.describe_code() == {}  # a repository of another project
    _git(tmp_path, "add", "cra_jax")
    _git(tmp_path, "commit", "--quiet", "-m", "y")
    commit = _git(tmp_path, "rev-parse", "HEAD").strip()
    assert provenance.describe_code() == {"commit": commit, "changed": []}
    assert provenance.describe_commit(provenance.describe_code()) == commit[:7]
    (package / "train.py").write_text("2")
    (package / "new.py").write_text("3")
    (tmp_path / "notes.txt").write_text("cannot change a run")
    code = provenance.describe_code()
    assert code["changed"] == ["cra_jax/train.py", "cra_jax/new.py"]
    assert provenance.describe_commit(code) == f"{commit[:7]} + 2 changed files"
