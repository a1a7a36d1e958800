"""The names that `--config` takes, and `configs` as the package that files import."""

import subprocess
import sys
from pathlib import Path

import pytest

from cra_jax.runtime import config_files

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def test_the_shipped_configs_are_those_of_the_repository():
    assert config_files.directory() == CONFIGS
    assert config_files.names() == ["cars", "cub", "quickstart"]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("cub", f"{CONFIGS}/cub.py"),
        ("cub:resnet101,baseline", f"{CONFIGS}/cub.py:resnet101,baseline"),
        ("quickstart:", f"{CONFIGS}/quickstart.py:"),
        ("mine.py:stn", "mine.py:stn"),
        ("cars", "cars"),  # a file of that name goes first
        (f"{CONFIGS}/cars.py", f"{CONFIGS}/cars.py"),
    ],
)
def test_a_name_or_a_file_is_found(tmp_path, monkeypatch, given, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    (tmp_path / "cars").touch()
    (tmp_path / "cub").mkdir()  # a directory is no config: this may be the dataset
    assert config_files.find(given) == found


@pytest.mark.parametrize("given", ["cubb", "cub.py", "configs/cub.py", "", ":stn"])
def test_an_unknown_name_is_answered_with_the_shipped_ones(
    tmp_path, monkeypatch, given
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="cars, cub, quickstart") as error:
        config_files.find(given)
    assert f"--config={given}: there is no such file" in str(error.value)


def test_configs_is_importable_from_any_directory(tmp_path):
    """Even where another `configs` lies, because there is one meaning of the name."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError\n")
    code = (
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        "from cra_jax.runtime import config_files\n"
        "config_files.make_importable(); import configs\n"
        "print(configs.__file__); print(list(configs.__path__))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[:2] == [f"{CONFIGS}/__init__.py", f"['{CONFIGS}']"]
