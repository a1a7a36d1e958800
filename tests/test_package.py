"""The wheel: what is in it, and the command that it installs, without a checkout."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cra_jax
from tests.helpers import tiny_config

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TINY = tiny_config.flags(
    **{"train.epochs": 1, "train.report": True, "eval.protocol": "center"}
)


def _pip(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        env={**os.environ, "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what git tracks, since building leaves files in its directory."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    folder = tmp_path_factory.mktemp("source")
    for name in filter(None, os.fsdecode(names).split("\0")):
        if (ROOT / name).is_file() and not name.startswith("docs/"):
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = "--no-deps", "--no-build-isolation", "--quiet", f"--wheel-dir={folder}"
    _pip("wheel", str(source), *options)
    (file,) = folder.iterdir()
    return file


class Installed:
    """The wheel in a directory of its own, and an empty one to use it from.

    Its dependencies are those of the Python that runs the tests.
    """

    def __init__(self, home: Path, wheel: Path):
        self.site, self.empty = home / "site", home / "empty"
        self.empty.mkdir()
        _pip("install", "--no-deps", "--quiet", f"--target={self.site}", str(wheel))
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        self._environment = {
            **environment,
            "PYTHONPATH": str(self.site),
            "XDG_CACHE_HOME": str(home / "cache"),
        }

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, command)),
            cwd=self.empty,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def command(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return self.run(self.site / "bin" / "cra-jax", *arguments)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("home"), wheel)


def test_the_wheel_has_the_package_and_its_configs_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    own = {x for x in names if ".dist-info/" not in x}
    expected = {
        file.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.html", "*.jinja", "py.typed")
        for file in (ROOT / "cra_jax").rglob(pattern)
    }
    configs = {f"cra_jax/configs/{x.name}" for x in (ROOT / "configs").glob("*.py")}
    assert own == expected | configs
    assert {
        "cra_jax/py.typed",
        "cra_jax/configs/cub.py",
        "cra_jax/inference/demo.html",
        "cra_jax/reports/templates/report.html.jinja",
    } <= own


def test_the_metadata_of_the_wheel(wheel):
    (name,) = (
        x for x in zipfile.ZipFile(wheel).namelist() if x.endswith("dist-info/METADATA")
    )
    lines = zipfile.ZipFile(wheel).read(name).decode().splitlines()
    assert f"Version: {cra_jax.__version__}" in lines
    assert "License-Expression: Apache-2.0" in lines
    authors = re.findall(
        r"(?s)^authors:\n  - name: (.*?)\n", (ROOT / "CITATION.cff").read_text(), re.M
    )
    assert f"Author: {authors[0]}" in lines
    found = {x.partition(": ")[2] for x in lines if x.startswith("Provides-Extra")}
    assert found == {"tfds", "tfds-build", "demo", "lite0"}


def test_requirements_are_the_dependencies_and_those_of_tfds():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [x.partition("#")[0].strip() for x in lines]
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["tfds"]]
    assert sorted(filter(None, listed)) == sorted(wanted)


def test_requirements_of_tests_have_those_of_the_demo():
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    listed = {x.partition("#")[0].strip() for x in lines}
    assert {*PROJECT["optional-dependencies"]["demo"]} <= listed


def test_the_changelog_has_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(
        rf"^## \[?{re.escape(cra_jax.__version__)}\]? - \d{{4}}-\d\d-\d\d$", text, re.M
    )
    assert text.index("Unreleased") < text.index(cra_jax.__version__)


def test_the_installed_command_answers_from_an_empty_directory(installed):
    version = installed.command("--version")
    assert version.stdout == f"cra_jax {cra_jax.__version__}\n", version.stderr
    shown = installed.command("--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: cra-jax [--mode MODE]")
    assert str(installed.site / "cra_jax" / "configs" / "cub.py") in shown.stdout
    unknown = installed.command("--config=cubb")
    assert unknown.returncode == 1
    assert unknown.stderr.count("\n") == 1
    assert "shipped are cars, cub, quickstart" in unknown.stderr
    assert not list(installed.empty.iterdir())


def test_the_installed_command_trains_evaluates_and_predicts(installed):
    trained = installed.command("--config=quickstart:baseline", *TINY)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.endswith("run directory: runs/quickstart-baseline\n")
    run = installed.empty / "runs" / "quickstart-baseline"
    start = json.loads((run / "provenance.json").read_text())["starts"][0]
    assert start["command"].startswith("cra-jax --config=quickstart:baseline --config.")
    assert start["code"] == {}
    # The report shows how the run differs from the recipe of the installed configs.
    assert (run / "report" / "index.html").stat().st_size > 10_000

    evaluated = installed.command("--mode=eval", f"--workdir={run}")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "\ntest, center: top-1 " in evaluated.stdout

    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(installed.empty / "a.png")
    predicted = installed.command("--mode=predict", f"--workdir={run}", "a.png")
    assert predicted.returncode == 0, predicted.stderr
    line = json.loads(predicted.stdout)
    code = (
        "import cra_jax; answer = cra_jax.load('runs/quickstart-baseline')('a.png')\n"
        "print(cra_jax.__file__); print(answer.classes[0])"
    )
    loaded = installed.run(sys.executable, "-c", code)
    assert loaded.stdout.splitlines() == [
        str(installed.site / "cra_jax" / "__init__.py"),
        line["top"][0]["class"],
    ]


@pytest.mark.slow
def test_an_own_config_trains_without_a_checkout(installed):
    (installed.empty / "my.py").write_text(
        "from configs.cars import get_config as cars\n"
        "from configs.quickstart import get_config as quickstart\n"
        "def get_config(variant=''):\n"
        "    assert cars(variant).data.source == 'cars'\n"
        "    return quickstart(variant)\n"
    )
    trained = installed.command("--config=my.py", *TINY, "--workdir=own")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.endswith("run directory: own\n")


@pytest.mark.slow
def test_an_editable_install_has_the_same_command(source, tmp_path):
    """In an environment of its own that sees the packages of this one."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    here = [x for x in sys.path if x.endswith("site-packages")]
    (site / "outer.pth").write_text("\n".join(here))
    python = str(home / "bin" / "python")
    options = "--no-deps", "--no-build-isolation", "--quiet", "--editable"
    _pip(f"--python={python}", "install", *options, str(source))
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def command(*arguments):
        return subprocess.run(
            [home / "bin" / "cra-jax", *arguments],
            cwd=empty,
            env={**environment, "XDG_CACHE_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )

    assert f"\n    {source}/configs/cub.py\n" in command("--help").stdout
    trained = command("--config=quickstart:baseline", *TINY)
    assert trained.returncode == 0, trained.stderr
    assert (empty / "runs" / "quickstart-baseline" / "metrics.jsonl").is_file()
