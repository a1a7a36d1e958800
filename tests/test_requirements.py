"""Lock files, requirements.txt, and the Python versions that run the tests."""

import os
import re
import sys
import tomllib
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCKS = sorted((ROOT / "requirements").glob("py*.txt"))
PYTHONS = [re.sub(r"py(\d)(\d+)", r"\1.\2", path.stem) for path in LOCKS]


def read(path: Path) -> list[Requirement]:
    """Returns the requirements of a file, without those of the files it includes."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-r ")]


def pins(path: Path) -> dict[str, Version]:
    """Returns the pinned versions of a lock file; all other specifiers are errors."""
    found = {}
    for requirement in read(path):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        assert not requirement.marker, requirement
        assert not requirement.url, requirement
        found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


def applies(requirement: Requirement, python: str) -> bool:
    marker = requirement.marker
    return not marker or marker.evaluate({"python_version": python, "extra": ""})


def test_each_python_has_a_lock_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert PYTHONS == ["3.11", "3.12", "3.13"]
    assert project["requires-python"] == f">={PYTHONS[0]}"


@pytest.mark.parametrize(("path", "python"), [*zip(LOCKS, PYTHONS, strict=True)])
def test_lock_file_satisfies_the_requirements(path, python):
    """Includes requirements-dev.txt, which is installed after the lock file."""
    pinned = pins(path)
    for requirement in read(ROOT / "requirements.txt"):
        if applies(requirement, python):
            version = pinned[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, (requirement, version)
    for requirement in read(ROOT / "requirements-dev.txt"):
        version = pinned.get(canonicalize_name(requirement.name))
        if version and applies(requirement, python):
            assert version in requirement.specifier, (requirement, version)


@pytest.mark.parametrize("path", LOCKS)
def test_lock_file_has_no_url_and_no_option(path):
    """The package index is the choice of the user."""
    assert "://" not in path.read_text()
    assert "--" not in path.read_text()


def test_torch_is_required_only_on_python_3_11():
    (torch,) = (x for x in read(ROOT / "requirements-dev.txt") if x.name == "torch")
    assert [applies(torch, python) for python in PYTHONS] == [True, False, False]


@pytest.fixture
def locked() -> dict[str, Version]:
    """Returns the pins of this environment (see `make test-python`)."""
    copied = Path(sys.prefix) / "lock.txt"
    if not copied.is_file():
        pytest.skip("this environment was not made from a lock file")
    python = f"py{sys.version_info.major}{sys.version_info.minor}.txt"
    lock = ROOT / "requirements" / python
    assert copied.read_text() == lock.read_text(), "the lock file has changed"
    return pins(lock)


def test_environment_has_the_versions_of_its_lock_file(locked):
    installed = {
        canonicalize_name(x.metadata["Name"]): Version(x.version)
        for x in distributions()
    }
    assert {name: installed.get(name) for name in locked} == locked


def test_lock_file_is_complete(locked):
    """Each dependency of a pinned package is pinned to a version that it accepts."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in locked:
        for requirement in map(Requirement, requires(name) or ()):
            if applies(requirement, python):
                needed = locked[canonicalize_name(requirement.name)]
                assert needed in requirement.specifier, (name, requirement, needed)


def test_workflow_runs_ci_on_each_python():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads `on` as True
    (job,) = workflow["jobs"].values()
    assert job["timeout-minutes"] == 90
    (setup,) = (x["with"] for x in job["steps"] if "setup-python" in x.get("uses", ""))
    versions = setup["python-version"].split()
    assert sorted(versions) == PYTHONS
    assert (
        versions[-1] == PYTHONS[0]
    )  # the last is `python3`, on which CI runs all tests
    for pattern in setup["cache-dependency-path"].split():
        assert list(ROOT.glob(pattern)), pattern
    (script,) = (step["run"] for step in job["steps"] if "run" in step)
    assert os.access(ROOT / script, os.X_OK)
    for step in job["steps"]:
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/x@v1"))


def test_ci_runs_each_locked_python():
    """The first Python runs all tests; the others run `make test-python`."""
    (versions,) = re.findall(r"for version in (.+); do", (ROOT / ".ci/run").read_text())
    assert versions.split() == PYTHONS[1:]
